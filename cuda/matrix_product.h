// The products that linear and its gradients are made of.
#pragma once

#include "../cpp/src/linear_params.h"

namespace ssmcore::cuda {

// out(m, n) = Σ_k a(m, k) b(n, k) + bias(n), or that added to out.
struct MatrixProduct {
  struct Matrix : Strided<2> {
    DType dtype = DType::float32;

    Matrix() = default;
    Matrix(const Strided<2>& tensor, DType dtype) : Strided<2>(tensor), dtype(dtype) {}
    Matrix transposed() const {
      Matrix result = *this;
      result.stride[0] = stride[1];
      result.stride[1] = stride[0];
      return result;
    }
  };

  int64_t m, n, k;
  Matrix a, b, out;
  Strided<1> bias;
  DType bias_dtype;
  bool accumulate;

  static MatrixProduct linear(const LinearParams& p) {
    Strided<2> weight;
    weight.data = const_cast<void*>(p.weight);
    weight.stride[0] = p.weight_row_stride;
    weight.stride[1] = 1;
    return {p.rows,
            p.out_features,
            p.in_features,
            {p.x, p.dtype},
            {weight, p.weight_dtype},
            {p.out, p.out_dtype},
            p.bias,
            p.bias_dtype,
            false};
  }
  static MatrixProduct linear_dx(const LinearBwdParams& p) {
    return gradient(p.rows, p.in_features, p.out_features, {p.dout, p.dout_dtype},
                    Matrix(p.weight, p.weight_dtype).transposed(), p.dx);
  }
  static MatrixProduct linear_dweight(const LinearBwdParams& p) {
    return gradient(p.out_features, p.in_features, p.rows,
                    Matrix(p.dout, p.dout_dtype).transposed(), Matrix(p.x, p.x_dtype).transposed(),
                    p.dweight);
  }

 private:
  static MatrixProduct gradient(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b,
                                const StridedGradient<2>& out) {
    return {m, n, k, a, b, {out, out.dtype}, {}, DType::float32, out.accumulate};
  }
};

}  // namespace ssmcore::cuda
