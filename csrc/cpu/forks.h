// Whether this process was forked from the one that loaded the library: threads, and what they hold, are lost then.
#pragma once

#include <atomic>
#include <cstdint>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace adamw_ext::cpu {

// How many forks lie between this process and the one that loaded the library.
inline std::atomic<std::uint64_t> forks{0};

#if defined(__unix__) || defined(__APPLE__)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++forks; });
#endif

}  // namespace adamw_ext::cpu
