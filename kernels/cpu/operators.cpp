// The operators of this library, as ONNX Runtime calls them. Each has the name of one of its own and takes its place.

#include <exception>
#include <mutex>
#include <vector>

#include "onnxruntime_abi.h"
#include "products.h"

namespace {

using namespace onnxruntime;

const Api* api = nullptr;

// A status of ONNX Runtime, as an exception.
struct Failed {
    Status* status;
};

void check(Status* status) {
    if (status) throw Failed{status};
}

void expect(bool condition, const char* message) {
    if (!condition) throw Failed{api->create_status(INVALID_ARGUMENT, message)};
}

// Runs a body; whatever it throws is given to ONNX Runtime.
template <typename Body>
Status* guarded(Body body) {
    try {
        body();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const std::exception& error) {
        return api->create_status(FAIL, error.what());
    }
}

int64_t integer(const KernelInfo* info, const char* name, int64_t otherwise) {
    int64_t value = 0;
    if (Status* status = api->kernel_info_get_int64(info, name, &value)) {
        api->release_status(status);
        return otherwise;
    }
    return value;
}

// A body that several threads run. None of them may end with an exception: the first one is kept.
struct Task {
    const std::function<void(size_t)>& body;
    std::mutex mutex;
    std::exception_ptr error;

    explicit Task(const std::function<void(size_t)>& body) : body(body) {}

    static void run(void* data, size_t index) {
        Task& task = *static_cast<Task*>(data);
        try {
            task.body(index);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(task.mutex);
            task.error = std::current_exception();
        }
    }
};

// What a node reads and writes in one run.
class Context {
  public:
    explicit Context(KernelContext* context) : context_(context) {
        check(api->kernel_context_get_input_count(context, &inputs_));
    }

    // Data of an input, or null if the node has none there.
    template <typename T>
    const T* input(size_t index) const {
        const Value* value = this->value(index);
        return value ? static_cast<const T*>(data(value)) : nullptr;
    }

    std::vector<int64_t> shape(size_t index) const {
        TensorInfo* info = nullptr;
        check(api->get_tensor_info(value(index), &info));
        size_t rank = 0;
        Status* status = api->get_dimensions_count(info, &rank);
        std::vector<int64_t> sizes(rank);
        if (!status) status = api->get_dimensions(info, sizes.data(), rank);
        api->release_tensor_info(info);
        check(status);
        return sizes;
    }

    template <typename T>
    T* output(size_t index, const std::vector<int64_t>& shape) {
        Value* value = nullptr;
        check(api->kernel_context_get_output(context_, index, shape.data(), shape.size(), &value));
        return static_cast<T*>(data(value));
    }

    fusion_edge::Parallel parallel() const {
        return [this](size_t count, const std::function<void(size_t)>& body) {
            if (count == 1) return body(0);
            Task task{body};
            check(api->parallel_for(context_, Task::run, count, count, &task));
            if (task.error) std::rethrow_exception(task.error);
        };
    }

  private:
    const Value* value(size_t index) const {
        const Value* value = nullptr;
        if (index < inputs_) check(api->kernel_context_get_input(context_, index, &value));
        return value;
    }

    static void* data(const Value* value) {
        void* data = nullptr;
        check(api->get_tensor_data(value, &data));
        return data;
    }

    KernelContext* context_;
    size_t inputs_ = 0;
};

// MatMulNBits: x, values, scales, zero points, group indices, bias -> product.
struct MatMulNBits {
    fusion_edge::Weights weights{};

    static constexpr const char* NAME = "MatMulNBits";
    static constexpr size_t INPUTS = 6, OUTPUTS = 1, REQUIRED_INPUTS = 3;
    static ElementType input_type(size_t index) {
        constexpr ElementType types[] = {FLOAT, UINT8, FLOAT, UINT8, INT32, FLOAT};
        return types[index];
    }

    explicit MatMulNBits(const KernelInfo* info) {
        weights.outputs = integer(info, "N", 0);
        weights.inputs = integer(info, "K", 0);
        weights.bits = int(integer(info, "bits", 4));
        weights.block_size = integer(info, "block_size", 0);
        expect(weights.bits == 4 || weights.bits == 8, "MatMulNBits: expected weights of 4 or 8 bits.");
    }

    void compute(Context& context) const {
        std::vector<int64_t> shape = context.shape(0);
        expect(!shape.empty() && size_t(shape.back()) == weights.inputs, "MatMulNBits: K is not the input's width.");
        fusion_edge::Weights own = weights;
        own.values = context.input<uint8_t>(1);
        own.scales = context.input<float>(2);
        own.zero_points = context.input<uint8_t>(3);
        own.bias = context.input<float>(5);
        expect(!context.input<int32_t>(4), "MatMulNBits: group indices are not supported.");
        size_t rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
        shape.back() = weights.outputs;
        float* result = context.output<float>(0, shape);
        if (rows) fusion_edge::multiply(context.input<float>(0), rows, own, result, context.parallel());
    }
};

template <typename Operator>
CustomOp custom_op() {
    CustomOp op{};
    op.version = API_VERSION;
    op.get_name = [](const CustomOp*) { return Operator::NAME; };
    op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
    op.get_input_type = [](const CustomOp*, size_t index) { return Operator::input_type(index); };
    op.get_input_count = [](const CustomOp*) { return Operator::INPUTS; };
    op.get_output_type = [](const CustomOp*, size_t) { return FLOAT; };
    op.get_output_count = [](const CustomOp*) { return Operator::OUTPUTS; };
    op.get_input_characteristic = [](const CustomOp*, size_t index) {
        return index < Operator::REQUIRED_INPUTS ? REQUIRED : OPTIONAL;
    };
    op.get_output_characteristic = [](const CustomOp*, size_t) { return REQUIRED; };
    op.get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
    op.get_start_version = [](const CustomOp*) { return 1; };
    op.get_end_version = [](const CustomOp*) { return 1; };
    op.create_kernel_v2 = [](const CustomOp*, const Api*, const KernelInfo* info, void** kernel) {
        return guarded([&] { *kernel = new Operator(info); });
    };
    op.compute_v2 = [](void* kernel, KernelContext* context) {
        return guarded([&] {
            Context one(context);
            static_cast<const Operator*>(kernel)->compute(one);
        });
    };
    op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
    return op;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this processor runs these operators.
EXPORTED bool is_supported() { return fusion_edge::is_supported(); }

// What ONNX Runtime calls when the library is registered for a session.
EXPORTED Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    static const CustomOp product = custom_op<MatMulNBits>();
    static CustomOpDomain* domain = nullptr;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    api = base->get_api(API_VERSION);
    if (!api) return base->get_api(1)->create_status(FAIL, "ONNX Runtime 1.23 or newer is needed.");
    return guarded([&] {
        if (!domain) {
            CustomOpDomain* created = nullptr;
            check(api->create_custom_op_domain("com.microsoft", &created));
            check(api->custom_op_domain_add(created, &product));
            domain = created;
        }
        check(api->add_custom_op_domain(options, domain));
    });
}
