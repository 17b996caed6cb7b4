// What Python calls by name: the library hides all else.
#pragma once

#define JAXCOMM_API extern "C" __attribute__((visibility("default")))
