// Binary layout of the part of ONNX Runtime's C interface that the kernels use (onnxruntime_c_api.h, which the Python
// wheels lack).
//
// OrtApi is a table of function pointers. Releases only append to it, so the index of an entry is fixed. ONNX Runtime
// reads OrtCustomOp up to the fields of its `version`.

#pragma once

#include <cstddef>
#include <cstdint>

namespace onnxruntime {

// ONNX Runtime 1.23, the oldest release that runs bundles.
constexpr uint32_t API_VERSION = 23;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;

enum ElementType : int32_t {
    UNDEFINED = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BOOL = 9, FLOAT16 = 10
};
enum Characteristic : int32_t { REQUIRED = 0, OPTIONAL = 1 };
enum ErrorCode : int32_t { FAIL = 1, INVALID_ARGUMENT = 2 };

struct Api {
    void* entries[300];

    template <typename Function>
    Function* at(size_t index) const {
        return reinterpret_cast<Function*>(entries[index]);
    }

    Status* create_status(ErrorCode code, const char* message) const {
        return at<Status*(ErrorCode, const char*)>(0)(code, message);
    }
    Status* create_custom_op_domain(const char* domain, CustomOpDomain** out) const {
        return at<Status*(const char*, CustomOpDomain**)>(26)(domain, out);
    }
    Status* custom_op_domain_add(CustomOpDomain* domain, const struct CustomOp* op) const {
        return at<Status*(CustomOpDomain*, const struct CustomOp*)>(27)(domain, op);
    }
    Status* add_custom_op_domain(SessionOptions* options, CustomOpDomain* domain) const {
        return at<Status*(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
    }
    Status* get_tensor_data(const Value* value, void** out) const {
        return at<Status*(const Value*, void**)>(51)(value, out);
    }
    Status* get_dimensions_count(const TensorInfo* info, size_t* out) const {
        return at<Status*(const TensorInfo*, size_t*)>(61)(info, out);
    }
    Status* get_dimensions(const TensorInfo* info, int64_t* out, size_t count) const {
        return at<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, out, count);
    }
    Status* get_tensor_info(const Value* value, TensorInfo** out) const {
        return at<Status*(const Value*, TensorInfo**)>(65)(value, out);
    }
    Status* kernel_info_get_float(const KernelInfo* info, const char* name, float* out) const {
        return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
    }
    Status* kernel_info_get_int64(const KernelInfo* info, const char* name, int64_t* out) const {
        return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    Status* kernel_info_get_string(const KernelInfo* info, const char* name, char* out, size_t* size) const {
        return at<Status*(const KernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size);
    }
    Status* kernel_context_get_input_count(const KernelContext* context, size_t* out) const {
        return at<Status*(const KernelContext*, size_t*)>(88)(context, out);
    }
    Status* kernel_context_get_input(const KernelContext* context, size_t index, const Value** out) const {
        return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
    }
    Status* kernel_context_get_output(
        KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** out) const {
        return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(
            context, index, shape, rank, out);
    }
    void release_status(Status* status) const { at<void(Status*)>(93)(status); }
    void release_tensor_info(TensorInfo* info) const { at<void(TensorInfo*)>(99)(info); }
    Status* parallel_for(
        const KernelContext* context, void (*body)(void*, size_t), size_t total, size_t batches, void* data) const {
        return at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
            context, body, total, batches, data);
    }
};

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*get_name)(const CustomOp*);
    const char* (*get_execution_provider)(const CustomOp*);
    ElementType (*get_input_type)(const CustomOp*, size_t);
    size_t (*get_input_count)(const CustomOp*);
    ElementType (*get_output_type)(const CustomOp*, size_t);
    size_t (*get_output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
    Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
    int32_t (*get_input_memory_type)(const CustomOp*, size_t);
    int (*get_variadic_input_min_arity)(const CustomOp*);
    int (*get_variadic_input_homogeneity)(const CustomOp*);
    int (*get_variadic_output_min_arity)(const CustomOp*);
    int (*get_variadic_output_homogeneity)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
    Status* (*compute_v2)(void*, KernelContext*);
    Status* (*infer_output_shape)(const CustomOp*, void*);
    int (*get_start_version)(const CustomOp*);
    int (*get_end_version)(const CustomOp*);
    size_t (*get_may_inplace)(int**, int**);
    void (*release_may_inplace)(int*, int*);
    size_t (*get_alias_map)(int**, int**);
    void (*release_alias_map)(int*, int*);
};

}  // namespace onnxruntime
