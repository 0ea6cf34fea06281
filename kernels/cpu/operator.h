// What an operator of this library needs to be called by ONNX Runtime.

#pragma once

#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "products.h"

namespace fusion_edge {

using namespace onnxruntime;

inline const Api* api = nullptr;

// A status of ONNX Runtime, as an exception.
struct Failed {
    Status* status;
};

inline void check(Status* status) {
    if (status) throw Failed{status};
}

inline void expect(bool condition, const std::string& message) {
    if (!condition) throw Failed{api->create_status(INVALID_ARGUMENT, message.c_str())};
}

// The same for what every step checks: the message is put together if it is needed.
inline void expect(bool condition, const char* node, const char* message) {
    if (!condition) expect(false, std::string(node) + ": " + message);
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

// Attributes of a node.
class Attributes {
  public:
    explicit Attributes(const KernelInfo* info) : info_(info) {}

    int64_t integer(const char* name, int64_t otherwise) const {
        int64_t value = 0;
        return found(api->kernel_info_get_int64(info_, name, &value)) ? value : otherwise;
    }
    float number(const char* name, float otherwise) const {
        float value = 0;
        return found(api->kernel_info_get_float(info_, name, &value)) ? value : otherwise;
    }
    std::string text(const char* name, const char* otherwise) const {
        size_t size = 0;
        if (!found(api->kernel_info_get_string(info_, name, nullptr, &size))) return otherwise;
        std::string value(size, 0);
        check(api->kernel_info_get_string(info_, name, value.data(), &size));
        value.resize(size - 1);  // the zero behind it
        return value;
    }

  private:
    static bool found(Status* status) {
        if (status) api->release_status(status);
        return !status;
    }

    const KernelInfo* info_;
};

// A body that several threads run. None of them may end with an exception: the last one is kept.
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

    bool has_input(size_t index) const { return value(index); }

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

    // Values of an input.
    size_t count(size_t index) const {
        size_t values = 1;
        for (const int64_t size : shape(index)) values *= size;
        return values;
    }

    template <typename T>
    T* output(size_t index, const std::vector<int64_t>& shape) {
        Value* value = nullptr;
        check(api->kernel_context_get_output(context_, index, shape.data(), shape.size(), &value));
        return static_cast<T*>(data(value));
    }

    Parallel parallel() const {
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

// An operator: NAME, INPUTS, OUTPUTS, REQUIRED_INPUTS, input_type(index), output_type(index), a constructor from
// Attributes and compute(Context&).
template <typename Operator>
CustomOp custom_op() {
    CustomOp op{};
    op.version = API_VERSION;
    op.get_name = [](const CustomOp*) { return Operator::NAME; };
    op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
    op.get_input_type = [](const CustomOp*, size_t index) { return Operator::input_type(index); };
    op.get_input_count = [](const CustomOp*) { return Operator::INPUTS; };
    op.get_output_type = [](const CustomOp*, size_t index) { return Operator::output_type(index); };
    op.get_output_count = [](const CustomOp*) { return Operator::OUTPUTS; };
    op.get_input_characteristic = [](const CustomOp*, size_t index) {
        return index < Operator::REQUIRED_INPUTS ? REQUIRED : OPTIONAL;
    };
    op.get_output_characteristic = [](const CustomOp*, size_t) { return REQUIRED; };
    op.get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
    op.get_start_version = [](const CustomOp*) { return 1; };
    op.get_end_version = [](const CustomOp*) { return 1; };
    op.create_kernel_v2 = [](const CustomOp*, const Api*, const KernelInfo* info, void** kernel) {
        return guarded([&] { *kernel = new Operator(Attributes(info)); });
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

}  // namespace fusion_edge
