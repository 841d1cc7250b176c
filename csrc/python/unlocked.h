// Work without the interpreter lock.
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace adamw_ext::python {

// Takes the lock back. A daemon thread that asks for it when the interpreter is going away is ended, before Python 3.14
// by unwinding, which would run destructors that need the lock, and terminate where one of them is pybind11's guard. It
// waits here instead, as from 3.14 on, until the process ends.
inline void take_lock_back(PyThreadState* thread) {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

template <class Work>
void without_interpreter_lock(const Work& work) {
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    work();
  } catch (...) {
    take_lock_back(thread);
    throw;
  }
  take_lock_back(thread);
}

}  // namespace adamw_ext::python
