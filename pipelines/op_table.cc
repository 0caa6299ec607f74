#include "pipelines/op_table.h"

#include <fmt/format.h>

#include "graph/op.h"

namespace calotype {
namespace {

std::string_view KindName(OpKind kind) {
  switch (kind) {
    case OpKind::kLeaf:
      return "leaf";
    case OpKind::kElementwise:
      return "elementwise";
    case OpKind::kReduce:
      return "reduction";
    case OpKind::kView:
      return "view";
    case OpKind::kCall:
      return "call";
  }
  return "";
}

// Text of a table cell.
std::string Cell(std::string_view text) {
  std::string cell;
  for (char c : text) cell += c == '|' ? std::string("\\|") : std::string(1, c);
  return cell;
}

}  // namespace

std::string OpTable() {
  std::string rows;
  for (const Op* op : AllOps()) {
    if (op->name.find('.') != std::string_view::npos) continue;  // a derivative
    std::string arity = op->max_arity == op->min_arity ? std::to_string(op->min_arity)
                        : op->max_arity < 0            ? fmt::format("{}..", op->min_arity)
                                            : fmt::format("{}-{}", op->min_arity, op->max_arity);
    rows += fmt::format("| `{}` | {} | {} | {} | {} | {} | {} |\n", op->name, KindName(op->kind),
                        arity, Cell(op->doc), op->gradient || op->elementwise ? "yes" : "",
                        op->decompose ? "yes" : "", Cell(op->source));
  }
  return "# Operations\n\n"
         "Made by `calotype info --ops > docs/ops.md`; do not edit. Every operation runs eagerly, "
         "in the float64 reference\n"
         "interpreter and in compiled code. `decomposes`: a fused operation that is defined by a "
         "graph of smaller ones. The\n"
         "derivatives of an elementwise operation are operations themselves, made by "
         "differentiating its formula: `Silu.dx`.\n\n"
         "| op | kind | inputs | meaning | gradient | decomposes | source "
         "|\n|---|---|---|---|---|---|---|\n" +
         rows;
}

}  // namespace calotype
