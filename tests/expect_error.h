// What a call that must fail says.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <string>

namespace calotype {

// The text of the error of type E that f() throws. The test fails if there is none, or one of
// another type.
template <class E, class F>
std::string MessageOf(F&& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an error of another type: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no error";
  return "";
}

}  // namespace calotype
