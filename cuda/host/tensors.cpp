// Where tensors lie, which gradients parameters have, and whether dicts hold the same ones: many in one call.
//
// Tensors are read by the C functions that DLPack 1.3 lets a class of tensors offer; what these leave out is asked of torch.
// The structs are DLPack's, declared here so that no headers are needed: https://github.com/dmlc/dlpack, dlpack.h. A
// caller has found version 1 in the table's header. The caller holds the interpreter's lock.
extern "C" {

typedef long Size;  // Py_ssize_t, int64_t
typedef unsigned long long Address;

Size PyList_Size(void* list);
void* PyList_GetItem(void* list, Size index);
void* PyList_New(Size size);
int PyList_Append(void* list, void* item);
void* PyTuple_GetItem(void* tuple, Size index);
void* PyTuple_Pack(Size size, ...);
void* PyObject_GetAttr(void* object, void* name);
void* PyObject_CallFunctionObjArgs(void* function, ...);  // arguments up to a null pointer
Size PyLong_AsSsize_t(void* number);
void Py_IncRef(void* object);
void Py_DecRef(void* object);
int PyDict_Next(void* dict, Size* position, void** key, void** value);  // 0 at the end, and for what is no dict
void* PyErr_Occurred();
int PyErr_ExceptionMatches(void* type);  // of the exception that is set
void PyErr_Clear();
extern void* PyExc_RuntimeError;

struct Object {  // PyObject of an interpreter with a global lock
    Size references;
    void* type;
};

struct DLTensor {
    char* data;
    int device_type, device_id, ndim;
    unsigned char code, bits;  // of the dtype
    unsigned short lanes;
    const Size* shape;
    const Size* strides;  // null for C order
    Address byte_offset;
};

typedef int (*TensorReader)(void* object, DLTensor* tensor);

struct DLPackExchangeAPI {
    unsigned int major, minor;
    void *previous, *allocate, *take, *make;
    TensorReader read;  // null where a library has none; -1 with a Python exception for what has no memory
};

// Mirrored by gpu_adam.devices.native_tensors.TENSOR.
struct ExpectedTensor {
    void* type;  // exactly this class; null where no tensor is expected
    const Size* shape;
    Size ndim, elements, code, bits;
};

constexpr Size COMPLEX = 5;  // DLPack's code

// How to ask torch what DLPack leaves out: objects of Python, which a caller keeps alive. Mirrored by `_asked` of
// gpu_adam.devices.native_tensors.
struct Questions {
    void* requires_grad;                              // the name of an attribute
    void *is_neg, *is_conj;                           // functions of a tensor
    void *untyped_storage, *nbytes, *storage_offset;  // of a tensor, of its storage, of a tensor
    void* no;                                         // False
};

// Mirrored by gpu_adam.devices.native_tensors.READING.
struct Reading {
    const ExpectedTensor* expected;
    Size count;
    const DLPackExchangeAPI* api;
    const Questions* questions;  // null where tensors need not be plain
    Size device_type, device_id;
};

static void* ask(void* function, void* object) {
    return PyObject_CallFunctionObjArgs(function, object, nullptr);
}

// Whether an answer, which is given away, is this object.
static bool is_given(void* answer, void* object) {
    if (answer) Py_DecRef(answer);
    return answer == object;
}

// An answer as a number; -1 where there is none.
static Size number_of(void* answer) {
    const Size number = answer ? PyLong_AsSsize_t(answer) : -1;
    if (answer) Py_DecRef(answer);
    return number;
}

// Whether a tensor requires no gradient, and its memory holds all elements as they are: none still to be negated or
// conjugated, none behind the end of a storage that was resized. Python may run: a Python exception may be left.
static bool is_plain(void* tensor, const ExpectedTensor& e, const Questions& q) {
    if (!is_given(PyObject_GetAttr(tensor, q.requires_grad), q.no) || !is_given(ask(q.is_neg, tensor), q.no)) return false;
    if (e.code == COMPLEX && !is_given(ask(q.is_conj, tensor), q.no)) return false;
    const Size offset = number_of(ask(q.storage_offset, tensor));
    void* const storage = offset < 0 ? nullptr : ask(q.untyped_storage, tensor);
    if (storage == nullptr) return false;
    const Size bytes = number_of(ask(q.nbytes, storage));
    Py_DecRef(storage);
    return (offset + e.elements) * (e.bits / 8) <= bytes;
}

static bool is_contiguous(const DLTensor& tensor) {
    Size stride = 1;
    for (int d = tensor.ndim - 1; tensor.strides && d >= 0; --d) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
        stride *= tensor.shape[d];
    }
    return true;
}

// An object of a list, or the first one of a tuple in it.
static void* object_at(void* list, Size i, bool is_in_pair) {
    void* const item = PyList_GetItem(list, i);
    return is_in_pair ? PyTuple_GetItem(item, 0) : item;
}

// Fetching ahead: have the caches fetch what a loop comes to soon. Between two steps a model drives tensors out of them, and
// to wait for one after the other takes as long as to read them. An object's head is fetched first; then what it points to.
constexpr Size FAR = 16, NEAR = 8;

// Fetch ahead of number i of some tensors. The third word of one points to torch's own object with shape and dtype. If a
// torch has something else there, that is fetched in vain.
static void fetch_ahead(void* tensors, Size i, Size count, const ExpectedTensor* expected, bool are_in_pairs) {
    if (i + FAR < count) __builtin_prefetch(object_at(tensors, i + FAR, are_in_pairs));
    if (i + NEAR >= count) return;
    void* const tensor = object_at(tensors, i + NEAR, are_in_pairs);
    if (expected && static_cast<Object*>(tensor)->type != expected[i + NEAR].type) return;  // it may have no third word
    const char* const own = static_cast<char**>(tensor)[2];
    __builtin_prefetch(own);
    __builtin_prefetch(own + 64);
}

// Where a tensor's first element lies, 1 for a tensor without elements; 0 where it does not fit, lies on another device,
// is not C-contiguous, does not lie at a multiple of its itemsize or, if there are questions, is not plain.
static Address address_of(void* object, const ExpectedTensor& e, const Reading& r) {
    DLTensor t;
    if (static_cast<Object*>(object)->type != e.type) return 0;
    if (r.api->read(object, &t)) {
        PyErr_Clear();
        return 0;
    }
    if (t.device_type != r.device_type || t.device_id != r.device_id || t.ndim != e.ndim) return 0;
    if (t.code != e.code || t.bits != e.bits || t.lanes != 1) return 0;
    for (int d = 0; d < t.ndim; ++d) {
        if (t.shape[d] != e.shape[d]) return 0;
    }
    const Address address = e.elements ? reinterpret_cast<Address>(t.data) + t.byte_offset : 1;
    if (e.elements && (!t.data || !is_contiguous(t) || address % (e.bits / 8) != 0)) return 0;
    return r.questions == nullptr || is_plain(object, e, *r.questions) ? address : 0;
}

// Write the addresses of the gradients in a list of pairs, as many as are expected, to where there is none yet. Returns
// how many of the tensors that are expected have none then; -1 with a Python exception, unless that is torch's own for a
// tensor of which it cannot tell.
Size read_gradients(void* pairs, const Reading* reading, Address* addresses) {
    Size missing = 0;
    for (Size i = 0; i < reading->count; ++i) {
        fetch_ahead(pairs, i, reading->count, reading->expected, true);
        const ExpectedTensor& expected = reading->expected[i];
        if (addresses[i] || !expected.type) continue;
        addresses[i] = address_of(object_at(pairs, i, true), expected, *reading);
        missing += addresses[i] == 0;
        if (PyErr_Occurred() == nullptr) continue;
        if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return -1;
        PyErr_Clear();
    }
    return missing;
}

// Whether the tensors in a list, as many as are expected, lie at these addresses.
int lie_at(void* tensors, const Reading* reading, const Address* addresses) {
    for (Size i = 0; i < reading->count; ++i) {
        fetch_ahead(tensors, i, reading->count, reading->expected, false);
        if (address_of(PyList_GetItem(tensors, i), reading->expected[i], *reading) != addresses[i]) return 0;
    }
    return 1;
}

// A list of (gradient, parameter) for those of a list of parameters that have a gradient; null with a Python exception.
void* pairs(void* parameters, void* grad, void* none) {
    void* const found = PyList_New(0);
    for (Size i = 0; found && i < PyList_Size(parameters); ++i) {
        fetch_ahead(parameters, i, PyList_Size(parameters), nullptr, false);
        void* const parameter = PyList_GetItem(parameters, i);
        Py_IncRef(parameter);  // a class of the user's may run Python
        void* const gradient = PyObject_GetAttr(parameter, grad);
        void* const pair = gradient && gradient != none ? PyTuple_Pack(2, gradient, parameter) : nullptr;
        const bool has_failed = gradient != none && (pair == nullptr || PyList_Append(found, pair) != 0);
        if (pair) Py_DecRef(pair);
        Py_DecRef(parameter);
        if (gradient) Py_DecRef(gradient);
        if (has_failed) {
            Py_DecRef(found);
            return nullptr;
        }
    }
    return found;
}

// Whether two lists hold the same objects, in order.
int are_same(void* one, void* other) {
    const Size count = PyList_Size(one);
    if (PyList_Size(other) != count) return 0;
    for (Size i = 0; i < count; ++i) {
        if (PyList_GetItem(one, i) != PyList_GetItem(other, i)) return 0;
    }
    return 1;
}

// Whether the dicts in a dict hold exactly these objects, in order.
//
// `known` is a list of the dicts that held them, from which memory is fetched ahead: their heads, and what the words behind
// point to, keys and values.
int hold(void* dicts, void* known, void* const* objects, Size count) {
    const Size expected = PyList_Size(known);
    Size place = 0, outer = 0;
    void *key, *dict, *value;
    for (Size i = 0; PyDict_Next(dicts, &outer, &key, &dict); ++i) {
        if (i + FAR < expected) __builtin_prefetch(PyList_GetItem(known, i + FAR));
        if (i + NEAR < expected) {
            void* const* const words = static_cast<void**>(PyList_GetItem(known, i + NEAR));
            __builtin_prefetch(words[4]);
            __builtin_prefetch(words[5]);
        }
        for (Size inner = 0; PyDict_Next(dict, &inner, &key, &value); ++place) {
            if (place == count || value != objects[place]) return 0;
        }
    }
    return place == count;
}

// Whether the table is of a version that is declared here, and has the function.
int can_read(const DLPackExchangeAPI* api) { return api->major == 1 && api->minor >= 3 && api->read != nullptr; }
}
