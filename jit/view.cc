#include "jit/view.h"

#include <algorithm>

namespace calotype::jit {

int64_t View::size(int axis) const {
  int64_t size = 1;
  for (const Piece& piece : axes[axis]) size *= piece.extent;
  return size;
}

int64_t View::elements() const {
  int64_t n = 1;
  for (int i = 0; i < static_cast<int>(axes.size()); ++i) n *= size(i);
  return n;
}

std::string View::ToString() const {
  std::string text = fmt::format("%{}+{}[", buffer, offset);
  for (size_t i = 0; i < axes.size(); ++i) {
    if (i) text += ", ";
    if (axes[i].empty()) text += "1";
    for (size_t j = 0; j < axes[i].size(); ++j) {
      text += fmt::format("{}{}:{}", j ? "." : "", axes[i][j].extent, axes[i][j].stride);
    }
  }
  return text + "]";
}

Axis Simplify(Axis axis) {
  Axis out;
  for (const Piece& piece : axis) {
    if (piece.extent == 1) continue;
    if (!out.empty() && out.back().stride == piece.stride * piece.extent) {
      out.back() = {out.back().extent * piece.extent, piece.stride};
    } else {
      out.push_back(piece);
    }
  }
  return out;
}

View RowMajor(int buffer, DType dtype, const Shape& shape) {
  View view{buffer, dtype, 0, std::vector<Axis>(shape.rank())};
  auto strides = shape.Strides();
  for (int i = 0; i < shape.rank(); ++i) view.axes[i] = Simplify({{shape[i], strides[i]}});
  return view;
}

View DenseInOrder(int buffer, DType dtype, const Shape& shape, std::span<const int> order) {
  View view{buffer, dtype, 0, std::vector<Axis>(shape.rank())};
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    view.axes[order[i]] = Simplify({{shape[order[i]], stride}});
    stride *= shape[order[i]];
  }
  return view;
}

View Compact(const View& view) {
  std::vector<Piece*> pieces;
  View out = view;
  out.offset = 0;
  for (Axis& axis : out.axes) {
    for (Piece& piece : axis) pieces.push_back(&piece);
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece* a, const Piece* b) {
    return std::abs(a->stride) > std::abs(b->stride);
  });
  int64_t stride = 1;
  for (size_t i = pieces.size(); i-- > 0;) {
    pieces[i]->stride = stride;
    stride *= pieces[i]->extent;
  }
  for (Axis& axis : out.axes) axis = Simplify(axis);
  return out;
}

std::optional<View> ReshapeView(const View& view, const Shape& shape) {
  // All pieces in row-major order of the indices, dealt out from the innermost axis on.
  std::vector<Piece> pieces;
  for (const Axis& axis : view.axes) pieces.insert(pieces.end(), axis.begin(), axis.end());
  pieces = Simplify(std::move(pieces));
  View out{view.buffer, view.dtype, view.offset, std::vector<Axis>(shape.rank())};
  for (int i = shape.rank() - 1; i >= 0; --i) {
    int64_t need = shape[i];
    Axis axis;  // innermost first
    while (need > 1) {
      if (pieces.empty()) return std::nullopt;
      Piece& piece = pieces.back();
      if (need % piece.extent == 0) {
        need /= piece.extent;
        axis.push_back(piece);
        pieces.pop_back();
      } else if (piece.extent % need == 0) {
        axis.push_back({need, piece.stride});
        piece = {piece.extent / need, piece.stride * need};
        need = 1;
      } else {
        return std::nullopt;
      }
    }
    std::reverse(axis.begin(), axis.end());
    out.axes[i] = Simplify(std::move(axis));
  }
  if (!pieces.empty()) return std::nullopt;
  return out;
}

std::optional<View> SliceView(const View& view, int axis, int64_t start, int64_t size) {
  View out = view;
  Axis& pieces = out.axes[axis];
  if (view.size(axis) == size) return out;
  // Only a range of the outermost piece is a view; an index picked from it goes one piece inwards.
  while (true) {
    int64_t inner = 1;
    for (size_t i = 1; i < pieces.size(); ++i) inner *= pieces[i].extent;
    if (pieces.empty()) return out;
    Piece& outer = pieces.front();
    if (start % inner == 0 && size % inner == 0) {
      out.offset += start / inner * outer.stride;
      outer.extent = size / inner;
      pieces = Simplify(pieces);
      return out;
    }
    if (start / inner != (start + size - 1) / inner) return std::nullopt;
    out.offset += start / inner * outer.stride;
    start %= inner;
    pieces.erase(pieces.begin());
  }
}

View PermuteView(const View& view, std::span<const int64_t> axes) {
  View out = view;
  for (size_t i = 0; i < axes.size(); ++i) out.axes[i] = view.axes[axes[i]];
  return out;
}

View InversePermuteView(const View& view, std::span<const int64_t> axes) {
  View out = view;
  for (size_t i = 0; i < axes.size(); ++i) out.axes[axes[i]] = view.axes[i];
  return out;
}

View BroadcastView(const View& view, const Shape& shape) {
  View out{view.buffer, view.dtype, view.offset, std::vector<Axis>(shape.rank())};
  int shift = shape.rank() - static_cast<int>(view.axes.size());
  for (int i = 0; i < shape.rank(); ++i) {
    int64_t size = i < shift ? 1 : view.size(i - shift);
    if (size == shape[i]) {
      if (i >= shift) out.axes[i] = view.axes[i - shift];
    } else {
      out.axes[i] = {{shape[i], 0}};
    }
  }
  return out;
}

View BitsView(const View& view) {
  View out = view;
  out.dtype = DType::kF32;
  int64_t words = DTypeSize(view.dtype) / 4;
  if (words == 1) return out;
  out.offset *= words;
  for (Axis& axis : out.axes) {
    for (Piece& piece : axis) piece.stride *= words;
  }
  out.axes.push_back({{words, 1}});
  return out;
}

bool IsRowMajor(const View& view) {
  int64_t stride = 1;
  for (size_t i = view.axes.size(); i-- > 0;) {
    for (size_t j = view.axes[i].size(); j-- > 0;) {
      if (view.axes[i][j].stride != stride) return false;
      stride *= view.axes[i][j].extent;
    }
  }
  return true;
}

}  // namespace calotype::jit
