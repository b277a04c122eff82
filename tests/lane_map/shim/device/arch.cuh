// The target that is simulated in place of the one that is compiled for.
#pragma once
#include_next "device/arch.cuh"
#undef SM120_OPS_NATIVE
#define SM120_OPS_NATIVE SIMULATE_NATIVE
