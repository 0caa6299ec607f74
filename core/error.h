// Typed errors. Every failure that a caller can cause is an exception derived from Error; the text
// says what is wrong, with the numbers, and what to do. The library never aborts the process.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace calotype {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value, option or configuration field is out of its range or unknown (exit code 2 of the app).
class ValueError : public Error {
  using Error::Error;
};
// Shapes, ranks or dtypes do not fit together.
class ShapeError : public ValueError {
  using ValueError::ValueError;
};
// The request is valid but not supported; the text names the op, layer, field or processor.
class UnsupportedError : public ValueError {
  using ValueError::ValueError;
};
// A file is missing, unreadable, damaged, or cannot be written (exit code 3).
class FileError : public Error {
  using Error::Error;
};
// A computation left the range of numbers, for example a NaN loss (exit code 4).
class NumericError : public Error {
  using Error::Error;
};
// Memory or the configured budget does not suffice (exit code 5).
class OutOfMemoryError : public Error {
  using Error::Error;
};
// A cancel callback asked to stop.
class CancelledError : public Error {
  using Error::Error;
};
// A defect of Calotype itself; please report it with the text.
class InternalError : public Error {
  using Error::Error;
};

// Throws E with the formatted text if `condition` is false.
template <class E = ValueError, class... Args>
inline void Check(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) [[unlikely]]
    throw E(fmt::format(format, std::forward<Args>(args)...));
}

template <class E = ValueError, class... Args>
[[noreturn]] inline void Fail(fmt::format_string<Args...> format, Args&&... args) {
  throw E(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace calotype
