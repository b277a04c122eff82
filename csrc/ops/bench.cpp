// CUDA entry point of the benchmark's ceilings.
#include "kernels/atom_rate.h"
#include "ops/common.h"

namespace sm120 {
namespace {

constexpr char kOp[] = "_atom_rate";

int64_t atom_rate(Tensor sink, std::string atom, int64_t iterations) {
  check(sink.is_cuda(), kOp, "sink", "a CUDA tensor", DeviceOf{sink});
  const int32_t device = sink.get_device_index();
  const DeviceProperties& gpu = require_supported_device(kOp, device);
  check(sink.scalar_type() == ScalarType::Float && sink.is_contiguous() &&
            sink.numel() >= 256ll * gpu.sm_count,
        kOp, "sink", "contiguous torch.float32 with 256 elements an SM", Shape{sink});
  check(iterations > 0 && iterations < (1ll << 31), kOp, "iterations", "1 .. 2^31 - 1", iterations);
  RateAtom which{};
  if (atom == "mxfp8_gran128") {
    which = RateAtom::kMxfp8Gran128;
  } else if (atom == "mxfp8_gran32") {
    which = RateAtom::kMxfp8Gran32;
  } else if (atom == "mxfp4") {
    which = RateAtom::kMxfp4;
  } else if (atom == "mxfp8_mxfp4") {
    which = RateAtom::kMxfp4Mxfp8;
  } else if (atom == "bf16") {
    which = RateAtom::kBf16;
  } else {
    fail(kOp, "atom", "mxfp8_gran128, mxfp8_gran32, mxfp4, mxfp8_mxfp4 or bf16", atom);
  }
  const DeviceGuard guard(device);
  cudaError_t error = cudaSuccess;
  const int64_t flops =
      launch_atom_rate(which, static_cast<int>(iterations), gpu.sm_count,
                       static_cast<float*>(sink.data_ptr()), current_stream(device), &error);
  if (error != cudaSuccess) fail_cuda(kOp, "the kernel launch", error);
  return flops;
}

}  // namespace
}  // namespace sm120

STABLE_TORCH_LIBRARY_IMPL(sm120, CUDA, m) {
  m.impl("_atom_rate", TORCH_BOX(&sm120::atom_rate));
}
