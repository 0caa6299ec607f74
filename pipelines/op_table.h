// The table of all operations as docs/ops.md shows it, made from the op records.
#pragma once

#include <string>

namespace calotype {

// Markdown.
std::string OpTable();

}  // namespace calotype
