// What lies behind many Python objects at once: the pairs of a step compared with those of the last one, and the
// addresses of NumPy's or CuPy's arrays, checked. NumPy's own look-up costs 2.6 microseconds an array, this one 0.01.
//
// Objects are read as CPython, NumPy 2 and CuPy lay them out in memory, declared here so that no headers are needed.
// NumPy's layout is part of its binary interface: PyArray_DATA and its like are inlined into every extension. CuPy's
// promises nothing, but stands in its core.pxd, from which its own extensions are compiled. A caller first asks
// `layout_is_known` or `cupy_layout_is_known`, and does without this file where the answer is no. The caller holds the
// interpreter's lock.
extern "C" {

typedef long Size;  // Py_ssize_t, npy_intp
typedef unsigned long long Address;

Size PyList_Size(void* list);
void* PyList_GetItem(void* list, Size index);
Size PyTuple_Size(void* tuple);
void* PyTuple_GetItem(void* tuple, Size index);

struct Object {  // PyObject of an interpreter with a global lock
    Size references;
    void* type;
};

struct Array {  // PyArrayObject_fields
    Object object;
    char* data;
    int ndim;
    Size* shape;
    Size* strides;
    void* base;
    void* dtype;
    int flags;
};

struct CupyPointer {  // cupy.cuda.MemoryPointer
    Object object;
    void* methods;
    Address address;
    int device;
};

struct CupyArray {  // cupy.ndarray
    Object object;
    void* methods;
    void* weak_references;
    Size size;
    const Size* shape[3];  // a std::vector: begin, end, end of its memory
    const Size* strides[3];
    int c_contiguous, f_contiguous, index_32_bits;
    void* dtype;
    const CupyPointer* data;
};

enum { C_CONTIGUOUS = 0x1, ALIGNED = 0x100, WRITEABLE = 0x400 };

static void* type_of(const void* object) { return static_cast<const Object*>(object)->type; }

// Mirrored by gpu_adam.devices.native_pairs.ARRAY. An array fits if it is exactly of this type (numpy.ndarray or
// cupy.ndarray), of this dtype object (of which NumPy has one for each built-in dtype in native byte order), of this
// shape, and for CuPy on this device.
struct ExpectedArray {
    void* type;
    void* dtype;
    const Size* shape;
    Size ndim;
    Size itemsize;
    Size device;  // of a CuPy array; -1 for NumPy's
};

static bool same_shape(const Size* shape, const ExpectedArray& expected) {
    for (Size d = 0; d < expected.ndim; ++d) {
        if (shape[d] != expected.shape[d]) return false;
    }
    return true;
}

static Address aligned(Address address, const ExpectedArray& expected) {
    return address % static_cast<Address>(expected.itemsize) == 0 ? address : 0;
}

static Address cupy_address_of(const void* object, const ExpectedArray& expected) {
    const CupyArray& a = *static_cast<const CupyArray*>(object);
    if (a.dtype != expected.dtype || a.shape[1] - a.shape[0] != expected.ndim || !a.c_contiguous) return 0;
    if (a.data->device != expected.device || !same_shape(a.shape[0], expected)) return 0;
    return a.size ? aligned(a.data->address, expected) : 1;  // CuPy gives empty arrays no memory
}

// The address of an array's first element; 0 unless it fits, is C-contiguous and lies at a multiple of its itemsize.
static Address address_of(const void* object, const ExpectedArray& expected, int wanted) {
    if (type_of(object) != expected.type) return 0;
    if (expected.device >= 0) return cupy_address_of(object, expected);
    const Array& a = *static_cast<const Array*>(object);
    if (a.dtype != expected.dtype || a.ndim != expected.ndim || (a.flags & wanted) != wanted) return 0;
    return same_shape(a.shape, expected) ? aligned(reinterpret_cast<Address>(a.data), expected) : 0;
}

// Mirrored by gpu_adam.devices.native_pairs.PAIR.
struct ExpectedPair {
    void* target;            // the variable, as it is passed
    Address target_address;  // of an array that is passed as a variable; 0 for other objects, which are not looked into
    void* other_type;        // the exact type of a gradient that is no array; null where an array is expected
    ExpectedArray array;     // the gradient's; a target that is looked into is of the same kind
};

struct ExpectedPairs {  // Mirrored by gpu_adam.devices.native_pairs.PAIRS.
    void* list_type;
    void* tuple_type;
    const ExpectedPair* pairs;
    Size count;
    const Address* last;  // addresses of the last call
    Address* addresses;   // of this one
};

enum Answer { OTHERS = -1, THE_SAME = 0, NEW = 1, INCOMPLETE = 2 };

// Compare `pairs` with the expected list of (gradient, variable) tuples, and read the gradients' addresses.
//   OTHERS      another list: other variables, or one that is not where it was
//   THE_SAME    the variables, with gradients at the last addresses
//   NEW         the variables, with gradients at other addresses
//   INCOMPLETE  the variables; the gradients with address 0 are no arrays that fit
int read_pairs(void* pairs, const ExpectedPairs* expected) {
    if (type_of(pairs) != expected->list_type || PyList_Size(pairs) != expected->count) return OTHERS;
    int answer = THE_SAME;
    for (Size i = 0; i < expected->count; ++i) {
        const ExpectedPair& e = expected->pairs[i];
        void* const pair = PyList_GetItem(pairs, i);
        if (type_of(pair) != expected->tuple_type || PyTuple_Size(pair) != 2) return OTHERS;
        void* const target = PyTuple_GetItem(pair, 1);
        if (target != e.target) return OTHERS;
        if (e.target_address && address_of(target, e.array, C_CONTIGUOUS | ALIGNED | WRITEABLE) != e.target_address) {
            return OTHERS;
        }
        void* const gradient = PyTuple_GetItem(pair, 0);
        if (e.other_type) {
            if (type_of(gradient) != e.other_type) return OTHERS;
            expected->addresses[i] = 0;
            continue;
        }
        const Address address = address_of(gradient, e.array, C_CONTIGUOUS | ALIGNED);
        expected->addresses[i] = address;
        if (!address) {
            answer = INCOMPLETE;
        } else if (answer == THE_SAME && address != expected->last[i]) {
            answer = NEW;
        }
    }
    return answer;
}

// addresses[i] of list[i], 0 where the object does not fit expected[i].
void array_addresses(void* list, Size count, const ExpectedArray* expected, Address* addresses) {
    for (Size i = 0; i < count; ++i) {
        addresses[i] = address_of(PyList_GetItem(list, i), expected[i], C_CONTIGUOUS | ALIGNED);
    }
}

// addresses[i] of NumPy array list[i], whatever its shape and dtype; all are of the array type or of one below it.
void data_addresses(void* list, Size count, Address* addresses) {
    for (Size i = 0; i < count; ++i) {
        addresses[i] = reinterpret_cast<Address>(static_cast<const Array*>(PyList_GetItem(list, i))->data);
    }
}

// Whether an array and its list are laid out in memory as declared here: the arguments say what must be found.
int layout_is_known(void* array, Address data, void* dtype, Size ndim, const Size* shape, int flags, void* array_type,
                    void* list, void* list_type) {
    if (type_of(array) != array_type || type_of(list) != list_type) return 0;
    const Array& a = *static_cast<const Array*>(array);
    if (reinterpret_cast<Address>(a.data) != data || a.dtype != dtype || a.ndim != ndim) return 0;
    for (Size d = 0; d < ndim; ++d) {
        if (a.shape[d] != shape[d]) return 0;
    }
    return (a.flags & (C_CONTIGUOUS | ALIGNED | WRITEABLE)) == flags;
}

// The same for a CuPy array of at least sizeof(CupyArray) bytes. Whatever is followed has been found to be a pointer.
int cupy_layout_is_known(const void* array, void* type, Size size, Size ndim, const Size* shape, int c_contiguous,
                         void* dtype, const void* data, Address address, int device) {
    const CupyArray& a = *static_cast<const CupyArray*>(array);
    if (type_of(array) != type || a.size != size || a.dtype != dtype || a.data != data) return 0;
    if (a.c_contiguous != c_contiguous || a.shape[1] - a.shape[0] != ndim) return 0;
    for (Size d = 0; d < ndim; ++d) {
        if (a.shape[0][d] != shape[d]) return 0;
    }
    return a.data->address == address && a.data->device == device;
}

Size cupy_array_bytes() { return sizeof(CupyArray); }

Size cupy_pointer_bytes() { return sizeof(CupyPointer); }
}
