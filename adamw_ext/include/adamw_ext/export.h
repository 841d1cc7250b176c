// What the library shows to those who link it; everything else is hidden.
#pragma once

#define ADAMW_EXT_API __attribute__((visibility("default")))
