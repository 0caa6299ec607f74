// The state of one lowering, shared by lower*.cc.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "jit/lower.h"
#include "jit/lower_groups.h"
#include "jit/lower_program.h"

namespace calotype::jit {

class Lowering {
 public:
  Lowering(const ComputationGraph& graph, const LowerOptions& options);
  LoweredProgram Run();

 private:
  // --- Places of values (lower.cc).
  void Place();
  bool PlaceValue(ValueId value, View view);
  bool AcceptsPlace(ValueId root, const View& view) const;
  void Assemble(int node);
  void WriteOutputs();
  void WriteUpdates();
  void UpdateInPlace();
  void SplitByChange(const std::vector<std::string>& rare_inputs);
  void ClearOnce();
  int NewBuffer(Storage storage, int index, DType dtype, int64_t elements, std::string label);
  View NewArena(const View& layout, DType dtype, int64_t elements, const std::string& label);
  std::optional<View>& Location(ValueId value) { return locations_[value.node][value.output]; }
  View Leaf(int node);
  // Where the elements of a value are; copies it when its views are no strides.
  View ViewOf(ValueId value);
  View RowMajorCopy(ValueId value);
  std::string LabelOf(int node) const;

  // --- Steps (lower_steps.cc). Operands hold buffer numbers until AddStep numbers the pointers.
  Step& AddStep(KernelSpec spec, std::string label);
  void Copy(View from, View to, const std::string& label);
  void Zero(const View& view, const std::string& label);
  static Operand MakeOperand(const View& view, std::vector<int64_t> strides);
  // Strides of an operand along the given leaf atoms, 0 where it does not move.
  std::vector<int64_t> StridesAlong(const LoopOperand& operand, const AtomAxis& atoms) const;
  AtomAxis LeavesByStride(const LoopOperand& operand) const;
  void AddLoop(const std::vector<LoopOperand>& inputs, const ScalarProgram& program,
               const std::vector<LoopOperand>& outputs, const std::string& label);

  void AddReduce(ReduceSpec spec, const std::string& label);
  void AddContraction(ContractionSpec spec, const std::string& label);

  // --- Regions (lower_region.cc).
  struct RegionOutput {
    ValueId value;
    LoopOperand place;
    std::optional<View> copy_to;  // the place that it could not be written to directly
  };
  void LowerGroup(Group& group);
  void LowerLoop(Group& group, const std::string& label);
  void LowerReduce(Group& group, const std::string& label);
  bool SplitReduction(const AtomAxis& kept, const AtomAxis& reduced,
                      const std::map<int, int64_t>& strides) const;
  void LowerContraction(Group& group, const std::string& label);
  LoopOperand NewTemporary(const AtomAxis& loops, const std::string& label);
  int64_t SumParts(const AtomAxis& m, int64_t n, const AtomAxis& k) const;
  void Evaluate(const std::vector<int>& nodes, const std::map<int, AtomAxes>& axes,
                std::map<int, int>& numbers, ProgramBuilder& builder);
  int Argument(ValueId value, const Shape& shape, const AtomAxes& axes,
               const std::map<int, int>& numbers, ProgramBuilder& builder);
  LoopOperand FitOperand(ValueId value, const Shape& shape, const AtomAxes& axes);
  std::vector<RegionOutput> Outputs(const Group& group);
  void FinishOutputs(const std::vector<RegionOutput>& outputs, const std::string& label);
  // What follows the anchor in registers: its program, and what it reads besides.
  struct RegionEpilogue {
    ScalarProgram program;
    std::vector<LoopOperand> operands;
  };
  RegionEpilogue EvaluateEpilogue(const Group& group, const std::vector<RegionOutput>& outputs);
  using Turned = std::vector<std::pair<LoopOperand, LoopOperand>>;  // temporary, place
  bool WorthTurning(const AtomAxis& space, int64_t columns) const;
  Turned TurnColumns(const AtomAxis& space, RegionEpilogue& epilogue,
                     std::vector<RegionOutput>& outputs, const std::string& label);
  void TurnBack(const Turned& turned, std::vector<RegionOutput>& outputs, const std::string& label);
  std::string RegionLabel(const Group& group) const;

  // --- Contractions (lower_contract.cc).
  struct Contraction {
    LoopOperand a, b;
    AtomAxis m, n, k;
  };
  Contraction MakeContraction(Group& group);
  bool ColumnsInLanes(const Contraction& c, const AtomAxis& mn) const;
  View Pack(const View& view, const std::string& label);
  View SinglePieces(ValueId value, std::initializer_list<int> axes);
  bool IsFixed(const View& view) const;
  bool MakeSumVector(const LoopOperand& a, LoopOperand& b, const std::string& label);
  void MakeVector(LoopOperand& b, const std::string& label);

  // --- Winograd's convolution (lower_winograd.cc).
  void PlacePoints(int node, const std::string& label);
  void LowerWinogradInput(int node, const std::string& label);
  void LowerWinogradWeight(int node, const std::string& label);
  void LowerWinogradOutput(Group& group, const std::string& label);

  // --- Calls (lower_calls.cc).
  void LowerCall(int node, const std::string& label);
  void LowerGather(int node, const std::string& label);
  void LowerScatterAdd(int node, const std::string& label);
  void LowerPhilox(int node, const std::string& label);
  void LowerAttention(int node, const std::string& label);
  void LowerAttentionGradient(int node, const std::string& label);
  static std::optional<Operand> TokenOperand(const View& view, int64_t batch, int64_t heads);
  Operand TokenInput(ValueId value, int64_t batch, int64_t heads);
  Operand TokenOutput(int node, int output, int64_t batch, int64_t heads, const std::string& label);
  AttentionSpec AttentionOperands(const ComputationNode& node, size_t mask);
  Operand LseOperand(const View& view);
  View OutputPlace(int node, int output, const std::string& label);
  void CheckIndices(const View& indices, int64_t limit, const std::string& label);

  LoweredProgram program_;
  const ComputationGraph& graph_;
  Groups groups_;
  std::vector<std::vector<View>> layouts_;
  bool fuse_;
  std::vector<std::vector<std::optional<View>>> locations_;
  std::map<int, View> leaves_;
  std::map<std::pair<int, int>, View> row_major_;
  std::map<std::string, View> packed_;
  std::set<std::pair<int, int>> to_copy_;  // (Pad or Concat, input) that is not written in place
  std::set<int> padded_;  // buffers that hold the result of one Pad and nothing else
  std::vector<bool> output_placed_;
  std::vector<std::string> rare_inputs_;
};

}  // namespace calotype::jit
