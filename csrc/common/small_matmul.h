// Products of small matrices for the CPU, whose columns lie in vector lanes: the matrices of a tile
// of pixels stay in the first-level cache, and a block of the result in registers.
//
// A row of a matrix is padded with zeros to a multiple of kPadding numbers and its memory begins at
// a multiple of 64 bytes, so there are no remainders.
#pragma once

#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kPadding = 16;
inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRowsAtOnce = 8;  // of two vectors each: 16 of the 32 registers hold sums
constexpr int64_t kDepthAtOnce = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRowsAtOnce = 4;  // of the 16 registers, 8
constexpr int64_t kDepthAtOnce = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kDepthAtOnce = 16;
#endif

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), may_alias));
};

// A matrix that is read number by number, in any order: transposing costs nothing.
template <typename Real>
struct Left {
  const Real* data;
  int64_t row, column;  // strides
};

// A matrix of padded rows.
template <typename Real>
struct Padded {
  Real* data;
  int64_t stride;
};

// kRows rows and kVectors vectors of columns of start + left right. kParts: partial sums of an
// element, of every kParts-th product. With one alone a narrow block would wait for its own
// additions.
template <int kRows, int kVectors, int kParts, typename Real>
inline void multiply_block(Left<Real> left, Padded<const Real> right, int64_t depth,
                           Padded<const Real> start, Padded<Real> out) {
  using Vector = typename VectorOf<Real>::type;
  constexpr int kLanes = kVectorBytes / sizeof(Real);
  Vector sums[kParts][kRows][kVectors] = {};
  const auto add = [&](int64_t k, int part) __attribute__((always_inline)) {
    Vector columns[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      columns[j] = *reinterpret_cast<const Vector*>(right.data + k * right.stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Real factor = left.data[i * left.row + k * left.column];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[part][i][j] += factor * columns[j];
    }
  };
  int64_t k = 0;
  for (; k + kParts <= depth; k += kParts) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) add(k + part, part);
  }
  if (kParts == 2 && k < depth) add(k, 0);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      Vector sum = sums[0][i][j];
      if constexpr (kParts == 2) sum += sums[1][i][j];
      *reinterpret_cast<Vector*>(out.data + i * out.stride + j * kLanes) =
          sum + *reinterpret_cast<const Vector*>(start.data + i * start.stride + j * kLanes);
    }
  }
}

// out (rows, columns) = start + left (rows, depth) right (depth, columns). `rows` is a multiple of
// kRowsAtOnce, `columns` of kPadding. `start` may be `out`, or of stride 0: one row for all.
// Products are added up kDepthAtOnce at a time: the rounding errors of one long sum grow with its
// length.
template <typename Real>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Left<Real> left,
                     Padded<const Real> right, Padded<const Real> start, Padded<Real> out) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real);
  for (int64_t k = 0; k < depth; k += kDepthAtOnce) {
    const int64_t n = min_of(kDepthAtOnce, depth - k);
    for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
      const Left<Real> factors{left.data + i * left.row + k * left.column, left.row, left.column};
      const auto at = [&](auto matrix, int64_t row, int64_t column) {
        matrix.data += row * matrix.stride + column;
        return matrix;
      };
      int64_t j = 0;
      for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
        multiply_block<kRowsAtOnce, 2, 1>(factors, at(right, k, j), n, at(start, i, j),
                                          at(out, i, j));
      for (; j < columns; j += kLanes)
        multiply_block<kRowsAtOnce, 1, 2>(factors, at(right, k, j), n, at(start, i, j),
                                          at(out, i, j));
    }
    start = {out.data, out.stride};
  }
}

// Adds the sum of `rows` rows to `out`. Several partial sums: one alone rounds more.
template <typename Real>
inline void add_rows(Padded<const Real> from, int64_t rows, Real* out) {
  using Vector = typename VectorOf<Real>::type;
  constexpr int64_t kLanes = kVectorBytes / sizeof(Real), kParts = 4;
  for (int64_t j = 0; j < from.stride; j += kLanes) {
    const auto row = [&](int64_t i) {
      return *reinterpret_cast<const Vector*>(from.data + i * from.stride + j);
    };
    Vector parts[kParts] = {};
    int64_t i = 0;
    for (; i + kParts <= rows; i += kParts) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) parts[part] += row(i + part);
    }
    for (; i < rows; ++i) parts[0] += row(i);
    *reinterpret_cast<Vector*>(out + j) += (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
