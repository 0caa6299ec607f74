// Atoms: the loop dimensions of a kernel while it is being put together. Every logical axis of
// every value in a kernel is a list of atoms, outermost first. Atoms are split when an operand's
// axis is split finer, and identified when two values turn out to be indexed alike, so values that
// are reshaped and permuted forms of each other share one loop nest.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "jit/view.h"

namespace calotype::jit {

using AtomAxis = std::vector<int>;
using AtomAxes = std::vector<AtomAxis>;  // per logical axis

class Atoms {
 public:
  int New(int64_t extent);
  AtomAxes NewAxes(const Shape& shape);
  int64_t extent(int atom) const { return atoms_[atom].extent; }

  // The atoms that stand for `atoms` after all splits and identifications so far.
  AtomAxis Leaves(const AtomAxis& atoms) const;
  AtomAxes Leaves(const AtomAxes& axes) const;

  // The index maps of Reshape and Permute. Reshape splits where needed; empty if the sizes do not
  // divide each other.
  std::optional<AtomAxes> Reshape(const AtomAxes& axes, const Shape& shape);
  static AtomAxes Permute(const AtomAxes& axes, const std::vector<int64_t>& order);
  static AtomAxes InversePermute(const AtomAxes& axes, const std::vector<int64_t>& order);

  // Identifies two equally indexed lists of axes. `a` stays, atoms of `b` become those of `a`.
  bool Identify(const AtomAxes& a, const AtomAxes& b);
  // Splits the atoms until each corresponds to one piece of the view's axis.
  bool Fit(const AtomAxis& atoms, const Axis& axis);
  bool Fit(const AtomAxes& atoms, const View& view);
  // (leaf atom, stride) for each leaf of `atoms`; call after all Fit.
  std::vector<std::pair<int, int64_t>> Strides(const AtomAxes& atoms, const View& view) const;

  // Splits a leaf into (extent / inner, inner) and returns both.
  AtomAxis SplitLeaf(int leaf, int64_t inner);

  // Undo: everything since the mark is taken back.
  size_t Mark() const { return log_.size(); }
  void Rollback(size_t mark);

 private:
  struct Atom {
    int64_t extent = 1;
    int outer = -1, inner = -1;  // after a split
    int same = -1;               // after an identification
  };
  // Splits `atom`, a leaf, into (extent / inner, inner).
  void Split(int atom, int64_t inner);
  void Append(int atom, AtomAxis& leaves) const;

  std::vector<Atom> atoms_;
  std::vector<std::pair<int, Atom>> log_;  // previous states
};

}  // namespace calotype::jit
