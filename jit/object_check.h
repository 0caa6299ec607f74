// What the linker may be given: an object file that defines one function and nothing else, calls
// nothing outside itself, has no data to write to and nothing that runs when it is loaded. Fresh
// code and code from the compile cache are checked alike.
#pragma once

#include <string>
#include <string_view>

namespace calotype::jit {

// Why `object` must not be linked as a kernel named `symbol`, or an empty text.
std::string ObjectProblem(std::string_view object, std::string_view symbol);

}  // namespace calotype::jit
