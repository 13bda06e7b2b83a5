// Schemas of the compiled operators. They write into tensors that Python allocated; each .cu file registers its kernels.
// The public operators, with their checks and formulas, are poisonshield::*, registered in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(poisonshield_cuda, m) {
  m.def(
      "linf_step_(Tensor(a!) x, Tensor grad, Tensor x0, Tensor? step, float step_number, Tensor? eps, float eps_number, "
      "Tensor? mean, Tensor? std, Tensor? mask, Tensor? active, float low, float high, int channel_step) -> ()");
  m.def(
      "ball_step_(Tensor(a!) x, Tensor grad, Tensor x0, Tensor? step, float step_number, Tensor? eps, float eps_number, "
      "Tensor? mean, Tensor? std, Tensor? mask, Tensor? active, Tensor(b!) sums, float low, float high, int channel_step, "
      "bool signs) -> ()");
  m.def(
      "linf_start_(Tensor(a!) x, Tensor x0, Tensor? eps, float eps_number, Tensor? seed, int seed_number, "
      "Tensor? offset, int offset_number, Tensor? stream, int stream_number, Tensor ids, Tensor? mean, Tensor? std, "
      "Tensor? mask, float low, float high, int channel_step, int columns) -> ()");
  m.def(
      "ball_start_(Tensor(a!) x, Tensor x0, Tensor? eps, float eps_number, Tensor? seed, int seed_number, "
      "Tensor? offset, int offset_number, Tensor? stream, int stream_number, Tensor ids, Tensor? mean, Tensor? std, "
      "Tensor? mask, Tensor(b!) sums, float low, float high, int channel_step, "
      "int columns) -> ()");
  m.def(
      "noising_(Tensor(a!) out, Tensor(b!) kept, Tensor x0, Tensor? noise, Tensor t, Tensor alphas, Tensor seed, "
      "Tensor offset, Tensor stream, bool keep) -> ()");
  m.def(
      "loss_(Tensor(a!) losses, Tensor(b!) grad, Tensor(c!) sums, Tensor pred, Tensor? target, Tensor? x0, Tensor? noise, "
      "Tensor? t, Tensor? alphas, Tensor seed, Tensor offset, Tensor stream, Tensor? mask, Tensor scale, int kind, int loss, "
      "float delta, int inner, int mask_row, int mask_channel, bool pred_grad) -> ()");
  m.def(
      "jpeg_(Tensor(a!) out, Tensor(b!) planes, Tensor x, Tensor tables, Tensor affine, bool half, bool smooth, bool exact, "
      "bool integer, int rounding, int terms) -> ()");
  m.def(
      "jpeg_backward_(Tensor(a!) dx, Tensor(b!) sums, Tensor(c!) planes, Tensor grad, Tensor x, Tensor tables, Tensor affine, "
      "bool half, bool smooth, bool integer, int rounding, int terms, float clamp_grad) -> ()");
}
