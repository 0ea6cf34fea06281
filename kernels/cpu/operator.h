// What an operator of this library needs to be called by ONNX Runtime.

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

[[noreturn]] inline void refuse(const char* node, const std::string& reason) {
    throw Failed{api->create_status(INVALID_ARGUMENT, (node + (": " + reason)).c_str())};
}

// Every step checks: the message is put together only if it is needed.
inline void expect(bool condition, const char* node, const char* reason) {
    if (!condition) refuse(node, reason);
}

// Runs a body of a node; whatever it throws is given to ONNX Runtime.
template <typename Body>
Status* guarded(const char* node, Body body) {
    try {
        body();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const std::bad_alloc&) {
        return api->create_status(FAIL, (std::string(node) + ": there is not enough memory.").c_str());
    } catch (const std::exception& error) {
        return api->create_status(FAIL, (std::string(node) + ": " + error.what()).c_str());
    }
}

// The largest of what a node counts by an attribute: products of two, and a few times one, fit int64_t.
constexpr int64_t LARGEST_COUNT = std::numeric_limits<int32_t>::max();

// Attributes of a node. One of another type than is read is refused, not taken for one that is missing.
class Attributes {
  public:
    Attributes(const char* node, const KernelInfo* info) : node_(node), info_(info) {}

    int64_t integer(const char* name, int64_t otherwise) const {
        int64_t value = 0;
        if (has(name, value)) return value;
        float number = 0;
        expect(!has(name, number) && !has_text(name), name, "an integer");
        return otherwise;
    }
    // An integer from 1 to LARGEST_COUNT.
    int64_t count(const char* name) const {
        const int64_t value = integer(name, 0);
        expect(value >= 1 && value <= LARGEST_COUNT, name, "an integer from 1 to " + std::to_string(LARGEST_COUNT));
        return value;
    }
    // Finite.
    float number(const char* name, float otherwise) const {
        float value = 0;
        const bool is_number = has(name, value);
        int64_t integer = 0;
        expect(is_number ? std::isfinite(value) : !has(name, integer) && !has_text(name), name, "a finite number");
        return is_number ? value : otherwise;
    }
    std::string text(const char* name, const char* otherwise) const {
        if (!has_text(name)) {
            int64_t integer = 0;
            float number = 0;
            expect(!has(name, integer) && !has(name, number), name, "a string");
            return otherwise;
        }
        size_t size = 0;
        check(api->kernel_info_get_string(info_, name, nullptr, &size));
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
    bool has(const char* name, int64_t& value) const { return found(api->kernel_info_get_int64(info_, name, &value)); }
    bool has(const char* name, float& value) const { return found(api->kernel_info_get_float(info_, name, &value)); }
    bool has_text(const char* name) const {
        size_t size = 0;
        return found(api->kernel_info_get_string(info_, name, nullptr, &size));
    }
    void expect(bool is_right, const char* name, const std::string& expected) const {
        if (!is_right) refuse(node_, std::string(name) + " is not " + expected + ".");
    }

    const char* node_;
    const KernelInfo* info_;
};

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
            if (!task.error) task.error = std::current_exception();
        }
    }
};

// What a node reads and writes in one run.
class Context {
  public:
    Context(const char* node, KernelContext* context) : node_(node), context_(context) {
        check(api->kernel_context_get_input_count(context, &inputs_));
    }

    // Data of an input, or null if the node has none there. Valid as long as this.
    template <typename T>
    const T* input(size_t index) {
        const Value* value = this->value(index);
        if (!value) return nullptr;
        const void* data = this->data(value);
        if (is_aligned<T>(data)) return static_cast<const T*>(data);
        // External data may stand anywhere in its file: it is read from a copy.
        const size_t bytes = count(index) * sizeof(T);
        copies_.push_back(std::make_unique<std::byte[]>(bytes));
        std::memcpy(copies_.back().get(), data, bytes);
        return reinterpret_cast<const T*>(copies_.back().get());
    }

    // The one value of an input; `name` in messages.
    template <typename T>
    T scalar(size_t index, const char* name) {
        if (count(index) != 1) refuse(node_, std::string("expected one value of ") + name + ".");
        return *input<T>(index);
    }

    bool has_input(size_t index) const { return value(index); }

    std::vector<int64_t> shape(size_t index) const {
        const Value* value = this->value(index);
        if (!value) refuse(node_, "expected input " + std::to_string(index) + ".");
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

    // Values of an input: they are in memory, so their number fits.
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
            refuse(
                node_,
                "expected output " + std::to_string(index) + " at a multiple of " + std::to_string(alignof(T)) + " bytes.");
        return static_cast<T*>(data);
    }

    Parallel parallel() const {
        return [this](size_t count, const std::function<void(size_t)>& body) {
            if (count == 0) return;
            if (count == 1) return body(0);
            Task task{body};
            check(api->parallel_for(context_, Task::run, count, count, &task));
            if (task.error) std::rethrow_exception(task.error);
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
        return guarded(Operator::NAME, [&] { *kernel = new Operator(Attributes(Operator::NAME, info)); });
    };
    op.compute_v2 = [](void* kernel, KernelContext* context) {
        return guarded(Operator::NAME, [&] {
            Context one(Operator::NAME, context);
            static_cast<const Operator*>(kernel)->compute(one);
        });
    };
    op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
    return op;
}

}  // namespace fusion_edge
