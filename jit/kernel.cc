#include "jit/kernel.h"

#include <algorithm>
#include <bit>

#include "core/error.h"

namespace calotype::jit {

namespace {

std::string Text(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += fmt::format("{}{}", i ? " " : "", values[i]);
  return text + "]";
}

std::string Text(const Operand& operand) {
  return fmt::format("{}@{}+{}{}{}", operand.dtype, operand.pointer, operand.offset,
                     Text(operand.strides),
                     operand.chain ? fmt::format(" by {}", operand.chain) : "");
}

std::string Text(const std::vector<Operand>& operands) {
  std::string text = "(";
  for (const Operand& operand : operands) text += fmt::format(" {}", Text(operand));
  return text + " )";
}

std::string Text(const Epilogue& epilogue) {
  return fmt::format("epilogue {{{}}} {} out {}", epilogue.program.ToString(),
                     Text(epilogue.operands), Text(epilogue.outputs));
}

struct Printer {
  std::string operator()(const LoopSpec& s) const {
    return fmt::format("loop {} in {} {{{}}} out {}", Text(s.extents), Text(s.inputs),
                       s.program.ToString(), Text(s.outputs));
  }
  std::string operator()(const ReduceSpec& s) const {
    return fmt::format("reduce {} {} over {} in {} {{{}}} {}",
                       s.kind == ReduceSpec::kSum ? "sum" : "max", Text(s.extents), Text(s.reduced),
                       Text(s.inputs), s.program.ToString(), Text(s.epilogue));
  }
  std::string operator()(const ChainSpec& s) const {
    std::string text = fmt::format("chain of {}", s.extent);
    for (const ChainSpec::Link& link : s.links)
      text += fmt::format(": {}", std::visit(*this, link));
    return text;
  }
  std::string operator()(const ContractionSpec& s) const {
    return fmt::format("contraction m {} n {} k {} a {} b {} {}{}", Text(s.m), s.n, Text(s.k),
                       Text(s.a), Text(s.b), Text(s.epilogue),
                       s.schedule ? fmt::format(" schedule {}", s.schedule) : "");
  }
  std::string operator()(const AttentionSpec& s) const {
    return fmt::format(
        "attention b {} h {} q {} k {} d {} v {} scale {} causal {} masked {} q {} k {} v {} mask "
        "{} "
        "out {} lse {}",
        s.batch, s.heads, s.queries, s.keys, s.head_dim, s.value_dim, s.scale, s.causal, s.has_mask,
        Text(s.q), Text(s.k), Text(s.v), Text(s.mask), Text(s.out), Text(s.lse));
  }
  std::string operator()(const AttentionGradientSpec& s) const {
    return fmt::format("attention gradient of ({}) dout {} dq {} dk {} dv {} part {} {} {}",
                       (*this)(s.forward), Text(s.dout), Text(s.dq), Text(s.dk), Text(s.dv), s.part,
                       s.dk_step, s.dv_step);
  }
  std::string operator()(const GatherSpec& s) const {
    return fmt::format("gather outer {} index {} inner {} of {} x {} indices {} out {}",
                       Text(s.outer), Text(s.index), Text(s.inner), s.axis_size, Text(s.x),
                       Text(s.indices), Text(s.out));
  }
  std::string operator()(const ScatterAddSpec& s) const {
    return fmt::format("scatter outer {} index {} inner {} of {} dy {} indices {} out {}",
                       Text(s.outer), Text(s.index), Text(s.inner), s.axis_size, Text(s.dy),
                       Text(s.indices), Text(s.out));
  }
  std::string operator()(const PhiloxSpec& s) const {
    return fmt::format("philox {} stream {} seed {} out {}", s.elements, s.stream, Text(s.seed),
                       Text(s.out));
  }
};

double Count(const std::vector<int64_t>& extents) {
  double product = 1;
  for (int64_t extent : extents) product *= static_cast<double>(extent);
  return product;
}

// A rough time in nanoseconds of one thread, and the number of results that can be computed apart.
struct Work {
  double nanoseconds = 0, results = 0;
};

double PerElement(size_t operands, const ScalarProgram& program) {
  return 0.25 * static_cast<double>(operands) + 0.04 * static_cast<double>(program.code.size());
}

struct Estimate {
  Work operator()(const LoopSpec& s) const {
    double n = Count(s.extents);
    return {n * PerElement(s.inputs.size() + s.outputs.size(), s.program), n};
  }
  Work operator()(const ReduceSpec& s) const {
    double n = Count(s.extents);
    return {n * Count(s.reduced) * PerElement(s.inputs.size(), s.program) +
                n * PerElement(s.epilogue.operands.size(), s.epilogue.program),
            n};
  }
  Work operator()(const ChainSpec& s) const {
    Work work{0, static_cast<double>(s.extent)};
    for (const ChainSpec::Link& link : s.links) {
      work.nanoseconds += work.results * std::visit(*this, link).nanoseconds;
    }
    return work;
  }
  Work operator()(const ContractionSpec& s) const {
    double n = Count(s.m) * static_cast<double>(s.n);
    return {
        n * Count(s.k) * 0.02 + n * PerElement(s.epilogue.operands.size() + 1, s.epilogue.program),
        n};
  }
  Work operator()(const AttentionSpec& s) const {
    double rows = static_cast<double>(s.batch * s.heads) * static_cast<double>(s.queries);
    double depth = static_cast<double>(s.head_dim + s.value_dim);
    return {rows * static_cast<double>(s.keys) * (0.02 * depth + 0.3) + rows * depth, rows};
  }
  Work operator()(const AttentionGradientSpec& s) const {
    Work forward = (*this)(s.forward);
    return {3 * forward.nanoseconds,
            static_cast<double>(s.forward.batch * s.forward.heads * s.Parts())};
  }
  Work operator()(const GatherSpec& s) const {
    double n = Count(s.outer) * Count(s.index) * Count(s.inner);
    return {n * 0.5, n};
  }
  Work operator()(const ScatterAddSpec& s) const {
    double n = Count(s.outer) * Count(s.inner);
    return {n * (Count(s.index) + static_cast<double>(s.axis_size)) * 0.5, n};
  }
  Work operator()(const PhiloxSpec& s) const {
    double n = static_cast<double>(s.elements);
    return {n * 2, n};
  }
};

}  // namespace

std::string ToString(const KernelSpec& spec) { return std::visit(Printer{}, spec); }

int64_t Chunks(const KernelSpec& spec) {
  // A chunk of at least 3 us pays for claiming it (measured: 20 us leaves a third of a small
  // U-Net's call to one thread, 1.5 us costs more than it gives); a power of two divides evenly
  // among the usual numbers of threads.
  constexpr double kGrain = 3e3, kMost = 256;
  Work work = std::visit(Estimate{}, spec);
  if (work.results == 0) return 0;
  double chunks = std::min({work.nanoseconds / kGrain, work.results, kMost});
  return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max(chunks, 1.0))));
}

}  // namespace calotype::jit
