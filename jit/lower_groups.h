// Regions: which nodes become one kernel. Elementwise chains join the contraction or reduction
// whose result they read (its epilogue), or each other (a loop); the elementwise input of a
// reduction is computed inside it. Views between them are index maps, not barriers. Internal to the
// lowering.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "jit/lower_atoms.h"

namespace calotype::jit {

// A value followed back through views to the value that holds its data.
struct Trace {
  ValueId root;
  bool bijective = true;  // every element of the root occurs exactly once, and no barrier between
};

struct Group {
  int anchor = -1;               // node, or -1 for a loop of elementwise nodes
  std::vector<int> prologue;     // elementwise nodes computed inside a reduction, ascending
  std::vector<int> body;         // elementwise nodes, ascending: a loop, or the anchor's epilogue
  std::map<int, AtomAxes> axes;  // of output 0 of anchor and body
  std::map<int, AtomAxes> prologue_axes;  // of the prologue's nodes
  AtomAxes input_axes;                    // of the reduction's input
};

class Groups {
 public:
  // With fuse = false every elementwise node is a kernel of its own.
  Groups(const ComputationGraph& graph, bool fuse);

  Trace TraceOf(ValueId value) const { return traces_[value.node][value.output]; }
  // The group that computes a node; -1 for leaves, views, and nodes that are computed only inside
  // reductions.
  int group_of(int node) const { return group_of_[node]; }
  Group& group(int index) { return groups_[index]; }
  // The order to run them in.
  const std::vector<int>& order() const { return order_; }
  // True if a value is read by a group other than its own, is an output, or the source of an
  // update.
  bool NeedsMemory(ValueId root) const;

  Atoms atoms;

 private:
  void FindTraces();
  void AbsorbIntoReductions();
  void Absorb(int reduce);
  bool EndsContraction(int node) const;
  void FindUsers();
  void Merge();
  bool TryMerge(int producer, int consumer);
  bool Reaches(int from, int to) const;
  bool Align(Group& a, Group& b);
  bool Consistent(const Group& group, int node) const;
  bool MapAxes(ValueId value, ValueId root, const AtomAxes& root_axes, AtomAxes& axes);
  int Operands(const Group& a, const Group& b) const;
  void Schedule();
  std::vector<ValueId> Reads(int node) const;  // values read from outside, prologue included

  const ComputationGraph& graph_;
  std::vector<std::vector<Trace>> traces_;
  std::vector<Group> groups_;
  std::vector<int> group_of_;
  std::vector<std::vector<int>> users_;  // nodes that read a node, through views and prologues
  std::vector<bool> live_, kept_;        // kept: output or update
  std::vector<int> order_;
  mutable std::vector<int> visited_;
  mutable int visit_ = 0;
};

}  // namespace calotype::jit
