// The shape law of ops that read experts from the pool, checked, and their Params.
#include "ops/pool_params.h"

#include "kernels/grouped_lora/sm90/device.h"

namespace milora {
namespace {

void check_tables(const char* op, const GroupedLoraPoolParams& p, const Tensor& x,
                  const Tensor& pool, const Tensor& offsets, const Tensor& ranks,
                  const Tensor& scales, const Tensor& gates, const Tensor& route_of,
                  const Tensor& adapter_of) {
  check_dtype(op, "pool", pool, ScalarType::Byte);
  check_dtype(op, "offsets", offsets, ScalarType::Long);
  check_dtype(op, "ranks", ranks, ScalarType::Int);
  check_dtype(op, "scales", scales, ScalarType::Float);
  check_dtype(op, "gates", gates, ScalarType::Float);
  check_dtype(op, "route_of", route_of, ScalarType::Int);
  check_dtype(op, "adapter_of", adapter_of, ScalarType::Int);
  check_shape(op, "pool", pool, {-1}, "[pool_bytes]");
  check_shape(op, "offsets", offsets, {-1, -1, kNumParts}, "[num_adapters, num_experts, 5]");
  check_shape(op, "ranks", ranks, {p.num_adapters, p.num_experts}, "[num_adapters, num_experts]");
  check_shape(op, "scales", scales, {p.num_adapters, p.num_experts}, "[num_adapters, num_experts]");
  check_shape(op, "gates", gates, {-1, p.num_experts}, "[num_routes, num_experts]");
  check_shape(op, "route_of", route_of, {p.num_tokens}, "[num_tokens]");
  check_shape(op, "adapter_of", adapter_of, {gates.size(0)}, "[num_routes]");
  const std::pair<const char*, const Tensor*> tables[] = {
      {"pool", &pool},   {"offsets", &offsets},   {"ranks", &ranks},          {"scales", &scales},
      {"gates", &gates}, {"route_of", &route_of}, {"adapter_of", &adapter_of}};
  const DeviceId device = device_of(x);
  for (const auto& [name, table] : tables) {
    check_same_device(op, name, *table, device);
    check_contiguous(op, name, *table);
  }
  check(reinterpret_cast<uintptr_t>(pool.const_data_ptr()) % 16 == 0, op,
        "pool must start on 16 bytes, got an address that does not");
}

}  // namespace

GroupedLoraPoolParams pool_params(const char* op, const Tensors& y, const Tensor& x,
                                  const Tensor& pool, const Tensor& offsets, const Tensor& ranks,
                                  const Tensor& scales, const Tensor& gates, const Tensor& route_of,
                                  const Tensor& adapter_of, const std::vector<int64_t>& experts) {
  GroupedLoraPoolParams p{};
  p.num_slices = static_cast<int64_t>(y.size());
  check(p.num_slices >= 1 && p.num_slices <= kMaxSlices, op, "y must have 1 to ", kMaxSlices,
        " slices, got ", p.num_slices);
  check(experts.size() == y.size(), op, "experts must have one column per slice (", p.num_slices,
        "), got ", experts.size());
  p.dtype = float_dtype(op, "x", x);
  const Rows x_rows = rows_of(op, "x", x);
  check(x_rows.width >= 1, op, "d_in must be at least 1, got 0");
  check(offsets.dim() == 3, op, "offsets must be [num_adapters, num_experts, 5], got ",
        Shape{offsets});
  p.num_tokens = x_rows.count;
  p.d_in = x_rows.width;
  p.num_adapters = offsets.size(0);
  p.num_experts = offsets.size(1);
  check_tables(op, p, x, pool, offsets, ranks, scales, gates, route_of, adapter_of);
  p.num_routes = gates.size(0);
  for (int64_t s = 0; s < p.num_slices; ++s) {
    check_dtype(op, "y", y[s], x.scalar_type());
    const Rows y_rows = rows_of(op, "y", y[s]);
    check(y_rows.count == p.num_tokens, op, "y must have one row per token of x (", p.num_tokens,
          "), got ", Shape{y[s]});
    check_same_device(op, "y", y[s], x);
    check(experts[s] >= 0 && experts[s] < p.num_experts, op, "experts must be in [0, ",
          p.num_experts, "), got ", experts[s]);
    p.y[s] = y[s].mutable_data_ptr();
    p.y_stride[s] = y_rows.stride;
    p.d_out[s] = y_rows.width;
    p.expert[s] = static_cast<int32_t>(experts[s]);
  }
  p.x = x.const_data_ptr();
  p.x_stride = x_rows.stride;
  p.pool = static_cast<const uint8_t*>(pool.const_data_ptr());
  p.pool_bytes = pool.size(0);
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  p.ranks = static_cast<const int32_t*>(ranks.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.gates = static_cast<const float*>(gates.const_data_ptr());
  p.route_of = static_cast<const int32_t*>(route_of.const_data_ptr());
  p.adapter_of = static_cast<const int32_t*>(adapter_of.const_data_ptr());
  return p;
}

void check_wgmma(const char* op, const Tensor& x, const char* advice) {
  check(x.scalar_type() != ScalarType::Float, op,
        "x must be bfloat16 or float16 on CUDA, got float32; ", advice);
  check(has_wgmma(x.get_device_index()), op,
        "x must be on a GPU of compute capability 9.0 (H100, H200), got another; ", advice);
}

void check_rows_on_16(const char* op, const char* name, const void* data, int64_t num_rows,
                      int64_t* stride) {
  if (num_rows <= 1) *stride = (*stride + 7) / 8 * 8;
  check(reinterpret_cast<uintptr_t>(data) % 16 == 0 && *stride % 8 == 0, op, name,
        " must have rows that start on 16 bytes on CUDA, got a row stride of ", *stride,
        " elements or an address that does not");
}

}  // namespace milora
