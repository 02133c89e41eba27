// Where tensors lie, and whether dicts hold the same ones: many in one call.
//
// Tensors are read by the C functions that DLPack 1.3 lets a class of tensors offer.
// The structs are DLPack's, declared here so that no headers are needed: https://github.com/dmlc/dlpack, dlpack.h. A
// caller has found version 1 in the table's header. The caller holds the interpreter's lock.
extern "C" {

typedef long Size;  // Py_ssize_t, int64_t
typedef unsigned long long Address;

Size PyList_Size(void* list);
void* PyList_GetItem(void* list, Size index);
int PyDict_Next(void* dict, Size* position, void** key, void** value);  // 0 at the end, and for what is no dict
void PyErr_Clear();

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
    void* type;  // exactly this class
    const Size* shape;
    Size ndim, code, bits;
};

static bool is_contiguous(const DLTensor& tensor) {
    Size stride = 1;
    for (int d = tensor.ndim - 1; tensor.strides && d >= 0; --d) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
        stride *= tensor.shape[d];
    }
    return true;
}

static Address address_of(void* object, const ExpectedTensor& e, TensorReader read, int device_type, int device_id) {
    DLTensor t;
    if (static_cast<Object*>(object)->type != e.type) return 0;
    if (read(object, &t)) {
        PyErr_Clear();
        return 0;
    }
    if (t.device_type != device_type || t.device_id != device_id || t.ndim != e.ndim) return 0;
    if (t.code != e.code || t.bits != e.bits || t.lanes != 1) return 0;
    bool is_empty = false;
    for (int d = 0; d < t.ndim; ++d) {
        if (t.shape[d] != e.shape[d]) return 0;
        is_empty = is_empty || t.shape[d] == 0;
    }
    if (is_empty) return 1;  // such a tensor may have no memory
    const Address address = reinterpret_cast<Address>(t.data) + t.byte_offset;
    return t.data && is_contiguous(t) && address % (e.bits / 8) == 0 ? address : 0;
}

// addresses[i] of list[i]; 0 where the object does not fit expected[i] and the device, is not C-contiguous, or does not
// lie at a multiple of its itemsize.
void tensor_addresses(void* list, const ExpectedTensor* expected, const DLPackExchangeAPI* api, int device_type,
                      int device_id, Address* addresses) {
    const Size count = PyList_Size(list);
    for (Size i = 0; i < count; ++i) {
        addresses[i] = address_of(PyList_GetItem(list, i), expected[i], api->read, device_type, device_id);
    }
}

// Whether the dicts in a dict hold exactly these objects, in order.
int hold(void* dicts, void* const* objects, Size count) {
    Size place = 0, outer = 0;
    void *key, *dict, *value;
    while (PyDict_Next(dicts, &outer, &key, &dict)) {
        for (Size inner = 0; PyDict_Next(dict, &inner, &key, &value); ++place) {
            if (place == count || value != objects[place]) return 0;
        }
    }
    return place == count;
}

// Whether the table is of a version that is declared here, and has the function.
int can_read(const DLPackExchangeAPI* api) { return api->major == 1 && api->minor >= 3 && api->read != nullptr; }
}
