#include "core/isa.h"
#include "graph/elementwise_kernels.h"

namespace calotype {

CALOTYPE_DECLARE_ISA(extern const ElementwiseKernel kElementwiseKernels[][4])

ElementwiseKernel FindElementwiseKernel(int entry, int part) {
  return CALOTYPE_SELECT_ISA(kElementwiseKernels)[entry][part];
}

}  // namespace calotype
