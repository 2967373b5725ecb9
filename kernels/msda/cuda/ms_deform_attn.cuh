/* The kernels of multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, equation 3).

   A row is one head of one query. `lanes` threads of a warp, a power of two, share a row. Each handles kVector adjacent
   channels, which are 16 bytes of value if the width allows it, so a corner of a sample is one load per thread.
   Geometry, weights and sums are float32 whatever the values' dtype. Offsets into tensors are 64-bit. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ms_deform_attn.h"

namespace msda {

constexpr int kThreads = 256;
// Minimum number of blocks per multiprocessor; with more, the compiler would spill registers to raise occupancy.
constexpr int kBlocks = 2;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

/* kVector adjacent channels, moved by one instruction. */
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Packet {
  T channel[kVector];
};

template <typename T, int kVector>
__device__ __forceinline__ Packet<T, kVector> load(const T* from) {
  return *reinterpret_cast<const Packet<T, kVector>*>(from);
}

template <typename T, int kVector>
__device__ __forceinline__ void store(T* to, const float (&x)[kVector]) {
  Packet<T, kVector> packet;
#pragma unroll
  for (int i = 0; i < kVector; i++) packet.channel[i] = from_float<T>(x[i]);
  *reinterpret_cast<Packet<T, kVector>*>(to) = packet;
}

/* Atomic addition; Hopper and later add four floats in one memory transaction. */
template <int kVector>
__device__ __forceinline__ void add(float* to, const float (&x)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kTogether = kVector % 4 == 0 ? 4 : 1;
#else
  constexpr int kTogether = 1;
#endif
#pragma unroll
  for (int i = 0; i < kVector; i += kTogether) {
    if constexpr (kTogether == 4)
      atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    else
      atomicAdd(to + i, x[i]);
  }
}

/* Position of a sample on its level: its upper left cell, its position within it, and which of its corners exist. */
struct Place {
  int64_t first;  // offset of the upper left corner from the row's channels in token 0
  float fx, fy;
  bool left, right, top, bottom;

  __device__ __forceinline__ Place(const Problem& problem, int level, float2 location, int64_t stride) {
    const int height = problem.height[level], width = problem.width[level];
    float x = location.x * width - 0.5f, y = location.y * height - 0.5f;
    // False for NaN too.
    const bool near = x > -1.0f && x < width && y > -1.0f && y < height;
    x = near ? x : 0.0f;
    y = near ? y : 0.0f;
    const float floor_x = floorf(x), floor_y = floorf(y);
    const int column = static_cast<int>(floor_x), row = static_cast<int>(floor_y);
    fx = x - floor_x;
    fy = y - floor_y;
    left = near && column >= 0;
    right = near && column + 1 < width;
    top = row >= 0;
    bottom = row + 1 < height;
    first = (problem.start[level] + static_cast<int64_t>(row) * width + column) * stride;
  }
};

template <typename T, int kVector>
struct Corners {
  Packet<T, kVector> packet[4];

  __device__ __forceinline__ Corners(const T* at, const Place& place, int64_t below, int64_t stride) {
    const Packet<T, kVector> zero = {};
    packet[0] = place.top && place.left ? load<T, kVector>(at) : zero;
    packet[1] = place.top && place.right ? load<T, kVector>(at + stride) : zero;
    packet[2] = place.bottom && place.left ? load<T, kVector>(at + below) : zero;
    packet[3] = place.bottom && place.right ? load<T, kVector>(at + below + stride) : zero;
  }
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const __grid_constant__ Problem problem, int lanes, const T* __restrict__ value,
                   const float* __restrict__ locations, const float* __restrict__ weights, T* __restrict__ out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (row >= problem.B * problem.Q * problem.M) return;
  const int samples = problem.L * problem.K;
  const int64_t stride = problem.M * problem.D;
  const T* head = value + (row / (problem.Q * problem.M) * problem.S * problem.M + row % problem.M) * problem.D;
  const float2* location = reinterpret_cast<const float2*>(locations) + row * samples;
  const float* weight = weights + row * samples;
  for (int64_t c = threadIdx.x % lanes * kVector; c < problem.D; c += lanes * kVector) {
    float sum[kVector] = {};
    for (int level = 0; level < problem.L; level++) {
      const int64_t below = problem.width[level] * stride;
#pragma unroll 2
      for (int k = 0; k < problem.K; k++) {
        const int p = level * problem.K + k;
        const Place place(problem, level, location[p], stride);
        const Corners<T, kVector> corners(head + place.first + c, place, below, stride);
        const float w = weight[p];
        const float share[4] = {w * (1 - place.fx) * (1 - place.fy), w * place.fx * (1 - place.fy),
                                w * (1 - place.fx) * place.fy, w * place.fx * place.fy};
#pragma unroll
        for (int corner = 0; corner < 4; corner++)
#pragma unroll
          for (int i = 0; i < kVector; i++) sum[i] += share[corner] * to_float(corners.packet[corner].channel[i]);
      }
    }
    store<T, kVector>(out + row * problem.D + c, sum);
  }
}

/* kWide: the row has more packets than threads, so that each thread handles several packets per sample. */
template <typename T, int kVector, bool kWide>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const __grid_constant__ Problem problem, int lanes, const T* __restrict__ grad_output,
                    const T* __restrict__ value, const float* __restrict__ locations,
                    const float* __restrict__ weights, float* grad_value, float* __restrict__ grad_locations,
                    float* __restrict__ grad_weights) {
  const int64_t rows = problem.B * problem.Q * problem.M;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  // Threads past the end repeat the last row without writing, because the sums need every thread of a warp.
  const bool real = row < rows;
  row = real ? row : rows - 1;
  const int lane = threadIdx.x % lanes;
  const int samples = problem.L * problem.K;
  const int64_t stride = problem.M * problem.D;
  const int64_t head = (row / (problem.Q * problem.M) * problem.S * problem.M + row % problem.M) * problem.D;
  const float2* location = reinterpret_cast<const float2*>(locations) + row * samples;
  const float* weight = weights + row * samples;
  const T* grad_row = grad_output + row * problem.D;
  const int64_t first_channel = lane * kVector;
  Packet<T, kVector> grad = {};
  if (!kWide && first_channel < problem.D) grad = load<T, kVector>(grad_row + first_channel);
  float mine_weight = 0, mine_x = 0, mine_y = 0;
  for (int level = 0; level < problem.L; level++) {
    const int width = problem.width[level], height = problem.height[level];
    const int64_t below = width * stride;
    for (int k = 0; k < problem.K; k++) {
      const int p = level * problem.K + k;
      const Place place(problem, level, location[p], stride);
      const float w = weight[p], fx = place.fx, fy = place.fy;
      const float across[2] = {1 - fx, fx}, down[2] = {1 - fy, fy};
      float dot[4] = {};
      for (int64_t c = first_channel; c < problem.D; c += lanes * kVector) {
        if (kWide) grad = load<T, kVector>(grad_row + c);
        const int64_t at = head + place.first + c;
        const Corners<T, kVector> corners(value + at, place, below, stride);
#pragma unroll
        for (int corner = 0; corner < 4; corner++) {
          const bool exists = (corner / 2 ? place.bottom : place.top) && (corner % 2 ? place.right : place.left);
          const float share = w * across[corner % 2] * down[corner / 2];
          float part[kVector];
#pragma unroll
          for (int i = 0; i < kVector; i++) {
            const float g = to_float(grad.channel[i]);
            dot[corner] += g * to_float(corners.packet[corner].channel[i]);
            part[i] = share * g;
          }
          if (real && exists)
            add<kVector>(grad_value + at + corner / 2 * below + corner % 2 * stride, part);
        }
        if (!kWide) break;
      }
      float by_weight = down[0] * (across[0] * dot[0] + across[1] * dot[1]) +
                        down[1] * (across[0] * dot[2] + across[1] * dot[3]);
      float by_x = w * width * (down[0] * (dot[1] - dot[0]) + down[1] * (dot[3] - dot[2]));
      float by_y = w * height * (across[0] * (dot[2] - dot[0]) + across[1] * (dot[3] - dot[1]));
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        by_weight += __shfl_xor_sync(kWholeWarp, by_weight, distance);
        by_x += __shfl_xor_sync(kWholeWarp, by_x, distance);
        by_y += __shfl_xor_sync(kWholeWarp, by_y, distance);
      }
      // Each thread keeps every lanes-th sample, so that all threads write adjacent results together.
      const int turn = p & (lanes - 1);
      if (turn == lane) {
        mine_weight = by_weight;
        mine_x = by_x;
        mine_y = by_y;
      }
      if ((turn == lanes - 1 || p == samples - 1) && lane <= turn && real) {
        const int64_t to = row * samples + p - turn + lane;
        grad_weights[to] = mine_weight;
        reinterpret_cast<float2*>(grad_locations)[to] = make_float2(mine_x, mine_y);
      }
    }
  }
}

}  // namespace msda
