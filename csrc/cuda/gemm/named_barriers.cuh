// The hardware barriers of a CTA that the GEMM kernels use, by number. A CTA has 16; __syncthreads takes the first.
#pragma once

namespace jmm {

enum NamedBarrier : int {
  // mma.sync: the warps that share a part of K, one barrier per part, counted from here.
  kTokensArrived = 1,
  // wgmma: the producer's threads, the last one too; the consumers where several share K.
  kRecordWritten = 1,
  kPartialsRead = 2,
  kPartialsWritten = 3,
  kNextWritten = 4,
  kWarpgroupAgrees = 5,  // one of each warpgroup that multiplies, counted from here
};

}  // namespace jmm
