// Adapter between ONNX Runtime's custom-operator interface and C++ classes.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "parallel.h"

namespace fusion_edge {

using namespace onnxruntime;

inline const Api* api = nullptr;

// An ONNX Runtime status, thrown as an exception.
struct StatusError {
    Status* status;
};

// Throws if a call of the interface failed.
inline void check(Status* status) {
    if (status) throw StatusError{status};
}

// Throws an error of a node; `reason` ends with a period.
[[noreturn]] inline void fail(const char* node, const std::string& reason) {
    throw StatusError{api->create_status(INVALID_ARGUMENT, (node + (": " + reason)).c_str())};
}

// Fails unless the condition holds. Builds the message only then, because every decode step checks.
inline void expect(bool condition, const char* node, const char* reason) {
    if (!condition) fail(node, reason);
}

// Runs the body of a node and returns its exception as a status, or null.
template <typename Body>
Status* to_status(const char* node, Body body) {
    try {
        body();
        return nullptr;
    } catch (const StatusError& failed) {
        return failed.status;
    } catch (const std::bad_alloc&) {
        return api->create_status(FAIL, (std::string(node) + ": out of memory.").c_str());
    } catch (const std::exception& error) {
        return api->create_status(FAIL, (std::string(node) + ": " + error.what()).c_str());
    }
}

// Largest count in an attribute. The product of two counts fits int64_t, with room for a small factor.
constexpr int64_t MAX_COUNT = std::numeric_limits<int32_t>::max();

// Attributes of a node. An attribute of the wrong type is an error, not a missing one.
class Attributes {
  public:
    Attributes(const char* node, const KernelInfo* info) : node_(node), info_(info) {}

    int64_t integer(const char* name, int64_t fallback) const {
        int64_t value = 0;
        if (has(name, value)) return value;
        float number = 0;
        expect(!has(name, number) && !has_text(name), name, "an integer");
        return fallback;
    }
    // Required, from 1 to MAX_COUNT.
    int64_t count(const char* name) const {
        const int64_t value = integer(name, 0);
        expect(value >= 1 && value <= MAX_COUNT, name, "an integer from 1 to " + std::to_string(MAX_COUNT));
        return value;
    }
    float number(const char* name, float fallback) const {
        float value = 0;
        const bool is_number = has(name, value);
        int64_t integer = 0;
        expect(is_number ? std::isfinite(value) : !has(name, integer) && !has_text(name), name, "a finite number");
        return is_number ? value : fallback;
    }
    std::string text(const char* name, const char* fallback) const {
        if (!has_text(name)) {
            int64_t integer = 0;
            float number = 0;
            expect(!has(name, integer) && !has(name, number), name, "a string");
            return fallback;
        }
        size_t size = 0;
        check(api->kernel_info_get_string(info_, name, nullptr, &size));
        std::string value(size, 0);
        check(api->kernel_info_get_string(info_, name, value.data(), &size));
        value.resize(size - 1);  // without the terminating zero
        return value;
    }

  private:
    static bool found(Status* status) {
        if (status) api->release_status(status);
        return !status;
    }
    bool has(const char* name, int64_t& value) const { return found(api->kernel_info_get_int64(info_, name, &value)); }
    bool has(const char* name, float& value) const { return found(api->kernel_info_get_float(info_, name, &value)); }
    bool has_text(const char* name) const {
        size_t size = 0;
        return found(api->kernel_info_get_string(info_, name, nullptr, &size));
    }
    void expect(bool is_valid, const char* name, const std::string& expected) const {
        if (!is_valid) fail(node_, std::string(name) + " is not " + expected + ".");
    }

    const char* node_;
    const KernelInfo* info_;
};

// A body that several threads of ONNX Runtime run. Exceptions must not leave them: the first one is kept as a status.
// (std::exception_ptr needs a libstdc++ newer than that of manylinux_2_28.)
struct Task {
    const char* node;
    const std::function<void(size_t)>& body;
    std::mutex mutex;
    Status* error = nullptr;

    Task(const char* node, const std::function<void(size_t)>& body) : node(node), body(body) {}

    static void run(void* data, size_t index) {
        Task& task = *static_cast<Task*>(data);
        try {
            task.body(index);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(task.mutex);
            if (!task.error) task.error = to_status(task.node, [] { throw; });
        }
    }
};

// Inputs and outputs of a node in one run.
class Context {
  public:
    Context(const char* node, KernelContext* context) : node_(node), context_(context) {
        check(api->kernel_context_get_input_count(context, &inputs_));
    }

    // Data of an input, or null if the node lacks it. Valid for the lifetime of this object.
    template <typename T>
    const T* input(size_t index) {
        const Value* value = this->value(index);
        if (!value) return nullptr;
        const void* data = this->data(value);
        if (is_aligned<T>(data)) return static_cast<const T*>(data);
        // External data may be at any offset of its file. Copy what is not aligned.
        const size_t bytes = count(index) * sizeof(T);
        copies_.push_back(std::make_unique<std::byte[]>(bytes));
        std::memcpy(copies_.back().get(), data, bytes);
        return reinterpret_cast<const T*>(copies_.back().get());
    }

    // Value of an input with one element; `name` is for the message.
    template <typename T>
    T scalar(size_t index, const char* name) {
        if (count(index) != 1) fail(node_, std::string("expected one value of ") + name + ".");
        return *input<T>(index);
    }

    bool has_input(size_t index) const { return value(index); }

    std::vector<int64_t> shape(size_t index) const {
        const Value* value = this->value(index);
        if (!value) fail(node_, "expected input " + std::to_string(index) + ".");
        TensorInfo* info = nullptr;
        check(api->get_tensor_info(value, &info));
        size_t rank = 0;
        Status* status = api->get_dimensions_count(info, &rank);
        std::vector<int64_t> sizes(rank);
        if (!status) status = api->get_dimensions(info, sizes.data(), rank);
        api->release_tensor_info(info);
        check(status);
        return sizes;
    }

    // Number of elements of an input. It fits size_t, because they are in memory.
    size_t count(size_t index) const {
        size_t values = 1;
        for (const int64_t size : shape(index)) values *= size;
        return values;
    }

    template <typename T>
    T* output(size_t index, const std::vector<int64_t>& shape) {
        Value* value = nullptr;
        check(api->kernel_context_get_output(context_, index, shape.data(), shape.size(), &value));
        void* data = this->data(value);
        if (!is_aligned<T>(data))
            fail(
                node_, "expected output " + std::to_string(index) + " at a multiple of " +
                           std::to_string(alignof(T)) + " bytes.");
        return static_cast<T*>(data);
    }

    Parallel parallel() const {
        return [this](size_t count, const std::function<void(size_t)>& body) {
            if (count == 0) return;
            if (count == 1) return body(0);
            Task task{node_, body};
            check(api->parallel_for(context_, Task::run, count, count, &task));
            check(task.error);
        };
    }

  private:
    template <typename T>
    static bool is_aligned(const void* data) {
        return reinterpret_cast<uintptr_t>(data) % alignof(T) == 0;
    }

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

    const char* node_;
    KernelContext* context_;
    size_t inputs_ = 0;
    std::vector<std::unique_ptr<std::byte[]>> copies_;
};

// Base of an operator with one float32 output and, unless it hides input_type, float32 inputs.
template <size_t INPUT_COUNT, size_t REQUIRED_COUNT = INPUT_COUNT>
struct FloatOperator {
    static constexpr size_t INPUTS = INPUT_COUNT, REQUIRED_INPUTS = REQUIRED_COUNT, OUTPUTS = 1;
    static ElementType input_type(size_t) { return FLOAT; }
    static ElementType output_type(size_t) { return FLOAT; }
};

// Returns the interface of a class `Operator` with NAME, INPUTS, REQUIRED_INPUTS, OUTPUTS, input_type(index),
// output_type(index), a constructor from Attributes, and compute(Context&) const.
template <typename Operator>
CustomOp custom_op() {
    CustomOp op{};
    op.version = API_VERSION;
    op.get_name = [](const CustomOp*) { return Operator::NAME; };
    op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // CPU
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
        return to_status(Operator::NAME, [&] { *kernel = new Operator(Attributes(Operator::NAME, info)); });
    };
    op.compute_v2 = [](void* kernel, KernelContext* context) {
        return to_status(Operator::NAME, [&] {
            Context run(Operator::NAME, context);
            static_cast<const Operator*>(kernel)->compute(run);
        });
    };
    op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
    return op;
}

}  // namespace fusion_edge
