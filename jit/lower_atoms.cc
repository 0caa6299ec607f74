#include "jit/lower_atoms.h"

#include <algorithm>

namespace calotype::jit {

int Atoms::New(int64_t extent) {
  atoms_.push_back({extent});
  return static_cast<int>(atoms_.size()) - 1;
}

AtomAxes Atoms::NewAxes(const Shape& shape) {
  AtomAxes axes(shape.rank());
  for (int i = 0; i < shape.rank(); ++i) {
    if (shape[i] != 1) axes[i] = {New(shape[i])};
  }
  return axes;
}

void Atoms::Append(int atom, AtomAxis& leaves) const {
  const Atom& a = atoms_[atom];
  if (a.same >= 0) {
    Append(a.same, leaves);
  } else if (a.outer >= 0) {
    Append(a.outer, leaves);
    Append(a.inner, leaves);
  } else {
    leaves.push_back(atom);
  }
}

AtomAxis Atoms::Leaves(const AtomAxis& atoms) const {
  AtomAxis leaves;
  for (int atom : atoms) Append(atom, leaves);
  return leaves;
}

AtomAxes Atoms::Leaves(const AtomAxes& axes) const {
  AtomAxes leaves;
  for (const AtomAxis& axis : axes) leaves.push_back(Leaves(axis));
  return leaves;
}

void Atoms::Split(int atom, int64_t inner) {
  int outer = New(atoms_[atom].extent / inner);
  int inside = New(inner);
  log_.push_back({atom, atoms_[atom]});
  atoms_[atom].outer = outer;
  atoms_[atom].inner = inside;
}

AtomAxis Atoms::SplitLeaf(int leaf, int64_t inner) {
  Split(leaf, inner);
  return {atoms_[leaf].outer, atoms_[leaf].inner};
}

void Atoms::Rollback(size_t mark) {
  while (log_.size() > mark) {
    atoms_[log_.back().first] = log_.back().second;
    log_.pop_back();
  }
}

std::optional<AtomAxes> Atoms::Reshape(const AtomAxes& axes, const Shape& shape) {
  AtomAxis all;
  for (const AtomAxis& axis : axes) {
    for (int atom : axis) Append(atom, all);
  }
  AtomAxes out(shape.rank());
  for (int i = shape.rank() - 1; i >= 0; --i) {
    int64_t need = shape[i];
    while (need > 1) {
      if (all.empty()) return std::nullopt;
      int atom = all.back();
      int64_t extent = atoms_[atom].extent;
      all.pop_back();
      if (need % extent == 0) {
        need /= extent;
        out[i].push_back(atom);
      } else if (extent % need == 0) {
        Split(atom, need);
        all.push_back(atoms_[atom].outer);
        out[i].push_back(atoms_[atom].inner);
        need = 1;
      } else {
        return std::nullopt;
      }
    }
    std::reverse(out[i].begin(), out[i].end());
  }
  if (!all.empty()) return std::nullopt;
  return out;
}

AtomAxes Atoms::Permute(const AtomAxes& axes, const std::vector<int64_t>& order) {
  AtomAxes out(axes.size());
  for (size_t i = 0; i < order.size(); ++i) out[i] = axes[order[i]];
  return out;
}

AtomAxes Atoms::InversePermute(const AtomAxes& axes, const std::vector<int64_t>& order) {
  AtomAxes out(axes.size());
  for (size_t i = 0; i < order.size(); ++i) out[order[i]] = axes[i];
  return out;
}

bool Atoms::Identify(const AtomAxes& a, const AtomAxes& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    AtomAxis x = Leaves(a[i]), y = Leaves(b[i]);
    while (!x.empty() || !y.empty()) {
      if (x.empty() || y.empty()) return false;
      int s = x.back(), t = y.back();
      x.pop_back();
      y.pop_back();
      if (s == t) continue;
      int64_t m = atoms_[s].extent, n = atoms_[t].extent;
      if (m == n) {
        log_.push_back({t, atoms_[t]});
        atoms_[t].same = s;
        // Later leaves of `a` and `b` may be the atoms just joined.
        x = Leaves(x);
        y = Leaves(y);
      } else if (m % n == 0) {
        Split(s, n);
        x.push_back(s);
        x = Leaves(x);
        y = Leaves(y);
        y.push_back(t);
      } else if (n % m == 0) {
        Split(t, m);
        y.push_back(t);
        x = Leaves(x);
        y = Leaves(y);
        x.push_back(s);
      } else {
        return false;
      }
    }
  }
  return true;
}

bool Atoms::Fit(const AtomAxis& atoms, const Axis& axis) {
  AtomAxis leaves = Leaves(atoms);
  Axis pieces = axis;
  while (!leaves.empty() && !pieces.empty()) {
    int atom = leaves.back();
    Piece& piece = pieces.back();
    int64_t extent = atoms_[atom].extent;
    if (piece.extent % extent == 0) {
      leaves.pop_back();
      piece = {piece.extent / extent, piece.stride * extent};
      if (piece.extent == 1) pieces.pop_back();
    } else if (extent % piece.extent == 0) {
      Split(atom, piece.extent);
      leaves.back() = atoms_[atom].outer;
      pieces.pop_back();
    } else {
      return false;
    }
  }
  return leaves.empty() && pieces.empty();
}

bool Atoms::Fit(const AtomAxes& atoms, const View& view) {
  if (atoms.size() != view.axes.size()) return false;
  for (size_t i = 0; i < atoms.size(); ++i) {
    if (!Fit(atoms[i], view.axes[i])) return false;
  }
  return true;
}

std::vector<std::pair<int, int64_t>> Atoms::Strides(const AtomAxes& atoms, const View& view) const {
  std::vector<std::pair<int, int64_t>> strides;
  for (size_t i = 0; i < atoms.size(); ++i) {
    AtomAxis leaves = Leaves(atoms[i]);
    Axis pieces = view.axes[i];
    while (!leaves.empty()) {
      int atom = leaves.back();
      leaves.pop_back();
      Check<InternalError>(!pieces.empty() && pieces.back().extent % atoms_[atom].extent == 0,
                           "lowering: view {} does not fit its loops", view.ToString());
      Piece& piece = pieces.back();
      strides.push_back({atom, piece.stride});
      piece = {piece.extent / atoms_[atom].extent, piece.stride * atoms_[atom].extent};
      if (piece.extent == 1) pieces.pop_back();
    }
  }
  return strides;
}

}  // namespace calotype::jit
