# The types of _core.py, for Cython, and what its tables are when it is compiled.
#
# A shard's table is a *line*: memory of its own, on as few cache lines as will do, since what two
# cores take from each other per call is what bounds them on a free-threaded Python. It has slots,
# one for each leader, and a hash table for the seats of those for whom there is none. A leader that
# nobody meets writes a slot and clears it, and makes no object at all: the seat, a tuple as in the
# plain form, but with a third item (which of its thread's leads it is), is made by the first who
# asks. That is `do`'s way. The other methods have made their seats before, and give up their slots
# to it.
#
# The table of the others is an array, probed from a seat's own place onwards (Knuth, TAOCP 3, 6.4,
# algorithms L and R). A dict would need an object for each hash. So that a call does not wait for
# memory when a million seats are in, there are two such tables: a small one that new seats enter,
# and that most have left again before it is full, and one for those that were in it when it was.
# A call that finds nobody reads but a byte of the larger one, for each entry has a tag (as in
# Abseil's Swiss tables, https://abseil.io/about/design/swisstables).
#
# With the GIL the GIL is the line's lock: between `lock` and `unlock` no Python code runs and
# nothing is allocated that the garbage collector knows. Without it, a PyMutex is.

from cpython.object cimport PyObject, PyTypeObject

cdef extern from "Python.h":
    Py_ssize_t Py_SIZE(object) noexcept

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport SIZE_MAX, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    typedef PyMutex shardedflight_mutex;
    #define shardedflight_lock(mutex) PyMutex_Lock(mutex)
    #define shardedflight_unlock(mutex) PyMutex_Unlock(mutex)
    #else
    typedef char shardedflight_mutex;
    #define shardedflight_lock(mutex) ((void)(mutex))
    #define shardedflight_unlock(mutex) ((void)(mutex))
    #endif
    #if defined(_MSC_VER)
    #define shardedflight_thread __declspec(thread)
    #define shardedflight_noinline __declspec(noinline)
    #elif defined(__GLIBC__)
    #define shardedflight_thread __thread __attribute__((tls_model("initial-exec")))
    #define shardedflight_noinline __attribute__((noinline))
    #else
    #define shardedflight_thread __thread
    #define shardedflight_noinline __attribute__((noinline))
    #endif
    /* `call` is the one call from C that may lead here again, and again, without a Python frame
       between. There has to be room left on the stack to clean up with, for start_new_thread at
       least, where the function finds none. */
    #if PY_VERSION_HEX >= 0x030E0000
    /* CPython measures the stack. Where there was room once, there is room again: so it is asked
       only where the thread has not been as deep before. */
    static shardedflight_thread uintptr_t shardedflight_deepest = UINTPTR_MAX;
    static shardedflight_noinline int shardedflight_has_room(uintptr_t here) {
        volatile char room[4096];
        room[0] = 0;
        if (Py_EnterRecursiveCall(" while leading")) return 0;
        Py_LeaveRecursiveCall();
        shardedflight_deepest = here;
        return 1;
    }
    static inline PyObject *shardedflight_call(PyObject *function) {
        volatile char here = 0;
        if ((uintptr_t)&here < shardedflight_deepest && !shardedflight_has_room((uintptr_t)&here))
            return NULL;
        return PyObject_CallNoArgs(function);
    }
    #else
    static shardedflight_noinline PyObject *shardedflight_call(PyObject *function) {
        PyObject *value;
    #if PY_VERSION_HEX >= 0x030C0000
        /* 10,000 calls of C are allowed, and a thread's stack has not room for so many of these. */
        if (Py_EnterRecursiveCall(" while leading")) return NULL;
    #endif
        if (Py_EnterRecursiveCall(" while leading")) {
            value = NULL;
        } else {
            value = PyObject_CallNoArgs(function);
            Py_LeaveRecursiveCall();
        }
    #if PY_VERSION_HEX >= 0x030C0000
        Py_LeaveRecursiveCall();
    #endif
        return value;
    }
    #endif
    /* As PyObject_TypeCheck, which has to look through the bases even of a ShardedFlight. */
    #define shardedflight_is_instance(object, type) \
        (Py_TYPE(object)->tp_base == (type) || PyObject_TypeCheck(object, type))
    #define shardedflight_take(value) (value)
    #define shardedflight_nothing() NULL
    #if PY_VERSION_HEX >= 0x030D0000
    #define shardedflight_find PyDict_GetItemRef
    #else
    static int shardedflight_find(PyObject *dict, PyObject *key, PyObject **found) {
        *found = Py_XNewRef(PyDict_GetItemWithError(dict, key));
        return *found != NULL ? 1 : PyErr_Occurred() ? -1 : 0;
    }
    #endif
    #if defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030E0000
    #define shardedflight_defer(object) PyUnstable_Object_EnableDeferredRefcount(object)
    #else
    #define shardedflight_defer(object) ((void)(object))
    #endif
    /* A block of lines is made once, by whichever of several threads is the first. */
    #ifdef Py_GIL_DISABLED
    #define shardedflight_block_at(place) ((char *)_Py_atomic_load_ptr_acquire(place))
    static inline int shardedflight_block_publish(char **place, char *block) {
        char *none = NULL;
        return _Py_atomic_compare_exchange_ptr(place, &none, block);
    }
    #else
    #define shardedflight_block_at(place) (*(place))
    #define shardedflight_block_publish(place, block) (*(place) ? 0 : (*(place) = (block), 1))
    #endif
    /* How many leads there were: those that a thread has at one time are nested in this order.
       With the GIL one count is enough for all threads. */
    #if defined(Py_GIL_DISABLED)
    static shardedflight_thread long long shardedflight_leads = 0;
    #else
    static long long shardedflight_leads = 0;
    #endif
    """
    int64_t leads "shardedflight_leads"
    ctypedef struct mutex_t "shardedflight_mutex":
        pass
    void lock "shardedflight_lock" (mutex_t*) noexcept nogil
    void unlock "shardedflight_unlock" (mutex_t*) noexcept nogil
    void defer "shardedflight_defer" (object)
    PyObject* call "shardedflight_call" (object) noexcept  # NULL: it has raised
    object take "shardedflight_take" (PyObject*)  # what `call` has returned, or has raised
    PyObject* nothing "shardedflight_nothing" () noexcept
    bint is_instance "shardedflight_is_instance" (object, PyTypeObject*) noexcept
    PyTypeObject* type_of "Py_TYPE" (PyObject*) noexcept
    char* block_at "shardedflight_block_at" (char**) noexcept
    bint block_publish "shardedflight_block_publish" (char**, char*) noexcept
    int dict_find "shardedflight_find" (object, object, PyObject**) except -1

cdef extern from "pythread.h":
    unsigned long get_ident "PyThread_get_thread_ident" () noexcept nogil

cdef enum:
    COMPILED = 1
    MOST_SLOTS = 16
    # What line_claim returns if it is no slot: the leader is in the table, the place is taken, there
    # is no slot left, or it leads only if nobody in Shard.overflow does: from slot LOOK - n (for
    # LOOK and less) or from the table.
    IN_MORE = 1 << 20
    TAKEN = -1
    FULL = -2
    LOOK_IN_MORE = -3
    LOOK = -4
    CACHE_LINE = 64
    BLOCK_BITS = 6
    BLOCK = 1 << 6
    FREE = -1
    LINKED = 0
    MET = 1
    BESIDE = 2
    FEWEST_EXTRAS = 8
    TAG = 0x80             # of an entry that is taken
    YOUNG = 64             # entries of the younger of a line's two tables

ctypedef struct slot_t:
    Py_hash_t h
    PyObject* part         # of the key, and the tuple of `more`; borrowed from the leader's frame.
    PyObject* more         # Once somebody has asked for the seat, `part` is the seat, and owned.
    unsigned long ident    # of the leader's thread; 0 if `part` is the seat, or the slot is free
    int64_t serial         # of the lead, among those of its thread, from 1 on. FREE: nobody has the
                           # slot. LINKED: a seat that does not know where it is, see `line_link`.

ctypedef struct entry_t:
    Py_hash_t h
    PyObject* seat         # owned

ctypedef struct extras_t:
    size_t mask            # one less than how many entries there are, a power of two
    size_t count           # how many of them are taken
    size_t recent          # the `count` of
    extras_t* younger      # the younger table; NULL until it is needed
    entry_t* entry         # apart from the tags, which so are on few pages, however many lines
    uint8_t tag[1]         # of each entry some bits of the hash, and TAG; 0: free

ctypedef struct line_t:
    mutex_t mutex
    uint8_t flags          # MET, BESIDE: whether Shard.met and Shard.overflow have anything
    uint8_t slots
    uint8_t top            # beyond are free slots only
    uint32_t extra         # how many seats are in the tables
    extras_t* extras       # the older one; NULL until there is a seat too many
    int64_t started
    slot_t slot[1]         # as many as `slots`

ctypedef struct lines_t:
    size_t count
    size_t slots
    size_t stride
    char** blocks          # BLOCK lines each, or all of them if there are fewer; NULL until the
    void** allocated       # first of them is needed. What they were allocated as.


# -- memory ----------------------------------------------------------------------------------------


cdef inline size_t slots_of(size_t count):
    """One slot fits into a line of 64 bytes; where there are few lines, they have more."""
    return MOST_SLOTS // count if count < MOST_SLOTS else 1


cdef inline size_t stride_of(size_t slots):
    cdef size_t size = sizeof(line_t) + (slots - 1) * sizeof(slot_t)
    return (size + CACHE_LINE - 1) & ~<size_t>(CACHE_LINE - 1)


cdef inline object make_lines(size_t count):
    """Returns a capsule with as many lines."""
    if count == 0 or count == SIZE_MAX:  # it has overflowed, or is about to
        raise MemoryError
    cdef lines_t* lines = <lines_t*>PyMem_RawCalloc(1, sizeof(lines_t))
    if lines == NULL:
        raise MemoryError
    lines.count = count
    lines.slots = slots_of(count)
    lines.stride = stride_of(lines.slots)
    lines.blocks = <char**>PyMem_RawCalloc(block_count(lines), sizeof(char*))
    lines.allocated = <void**>PyMem_RawCalloc(block_count(lines), sizeof(void*))
    if lines.blocks == NULL or lines.allocated == NULL:
        free_lines(lines)
        raise MemoryError
    return PyCapsule_New(lines, NULL, drop_lines)


cdef inline size_t block_count(lines_t* lines) noexcept:
    return (lines.count + BLOCK - 1) >> BLOCK_BITS


cdef inline int make_block(lines_t* lines, size_t number) except -1:
    """Sees to it that there is the block with this number."""
    if block_at(&lines.blocks[number]) != NULL:
        return 0
    cdef size_t count = lines.count if lines.count < BLOCK else BLOCK
    # One line more than are used, to align them. A product that overflows is refused by RawCalloc.
    cdef void* allocated = PyMem_RawCalloc(count + 1, lines.stride)
    if allocated == NULL:
        raise MemoryError
    cdef char* first = <char*>(
        (<uintptr_t>allocated + CACHE_LINE - 1) & ~<uintptr_t>(CACHE_LINE - 1)
    )
    cdef line_t* line
    cdef size_t i, s
    for i in range(count):
        line = <line_t*>(first + i * lines.stride)
        line.slots = <uint8_t>lines.slots
        for s in range(lines.slots):
            line.slot[s].serial = FREE
    if block_publish(&lines.blocks[number], first):
        lines.allocated[number] = allocated
    else:  # another thread has made it
        PyMem_RawFree(allocated)
    return 0


cdef inline void free_lines(lines_t* lines) noexcept:
    """No block has any seat left."""
    cdef size_t b
    if lines.allocated != NULL:
        for b in range(block_count(lines)):
            PyMem_RawFree(lines.allocated[b])
    PyMem_RawFree(lines.allocated)
    PyMem_RawFree(lines.blocks)
    PyMem_RawFree(lines)


cdef inline lines_t* lines_of(object memory):
    return <lines_t*>PyCapsule_GetPointer(memory, NULL)


cdef inline char** blocks_in(object memory):
    return lines_of(memory).blocks


cdef inline line_t* line_among(char** blocks, size_t stride, size_t index) noexcept:
    """A line in which somebody may have led, or NULL."""
    cdef char* block = block_at(&blocks[index >> BLOCK_BITS])
    if block == NULL:
        return NULL
    return <line_t*>(block + (index & (BLOCK - 1)) * stride)


cdef inline line_t* line_made(lines_t* lines, size_t index) noexcept:
    return line_among(lines.blocks, lines.stride, index)


cdef inline line_t* line_at(object memory, size_t index) except NULL:
    cdef lines_t* lines = lines_of(memory)
    make_block(lines, index >> BLOCK_BITS)
    return line_made(lines, index)


cdef inline void drop_lines(object memory) noexcept:
    cdef lines_t* lines = <lines_t*>PyCapsule_GetPointer(memory, NULL)
    cdef line_t* line
    cdef extras_t* extras
    cdef size_t i, s
    for i in range(lines.count):
        line = line_made(lines, i)
        if line == NULL:
            continue
        for s in range(line.slots):
            if is_made(&line.slot[s]):
                Py_DECREF(<object>line.slot[s].part)
        extras = line.extras
        if extras != NULL:
            drop_extras(extras.younger)
            drop_extras(extras)
    free_lines(lines)


cdef inline void lines_orphan(object memory):
    """In a forked child: nobody holds a lock any more."""
    cdef lines_t* lines = lines_of(memory)
    cdef line_t* line
    cdef size_t i, b
    for i in range(lines.count):
        line = line_made(lines, i)
        if line != NULL:
            for b in range(sizeof(mutex_t)):
                (<char*>&line.mutex)[b] = 0


# -- the seats for which there is no slot; all of it under the lock ---------------------------------


cdef inline void free_extras(extras_t* extras) noexcept nogil:
    PyMem_RawFree(extras.entry)
    PyMem_RawFree(extras)


cdef inline void drop_extras(extras_t* extras) noexcept:
    """Frees a table, if there is one, with the seats in it."""
    cdef size_t i
    if extras != NULL:
        for i in range(extras.mask + 1):
            if extras.tag[i]:
                Py_DECREF(<object>extras.entry[i].seat)
        free_extras(extras)


cdef inline size_t copy_hashes(extras_t* extras, Py_hash_t* hashes) noexcept nogil:
    """Writes the hashes that are in a table, if there is one; returns how many."""
    cdef size_t count = 0
    cdef size_t i
    if extras != NULL:
        for i in range(extras.mask + 1):
            if extras.tag[i]:
                hashes[count] = extras.entry[i].h
                count += 1
    return count


cdef inline uint64_t mix(Py_hash_t h) noexcept nogil:
    """What places a hash: the place in the low bits, the tag in the highest."""
    # The bits that have chosen the line (see `mixed`) are those of all hashes here.
    cdef uint64_t bits = <uint64_t>h
    bits = (bits ^ (bits >> 32)) * <uint64_t>0xD6E8FEB86659FD93ULL
    return bits ^ (bits >> 32)


cdef inline uint8_t tag_of(uint64_t mixed) noexcept nogil:
    return <uint8_t>(mixed >> 57) | TAG


cdef inline size_t entry_of(extras_t* extras, uint64_t mixed, Py_hash_t h) noexcept nogil:
    """The entry with this hash, or the free one where it belongs."""
    cdef size_t i = mixed & extras.mask
    cdef uint8_t tag = tag_of(mixed)
    while extras.tag[i] and (extras.tag[i] != tag or extras.entry[i].h != h):
        i = (i + 1) & extras.mask
    return i


cdef inline PyObject* in_extras(line_t* line, Py_hash_t h) noexcept nogil:
    """The seat with this hash, borrowed, or NULL."""
    cdef extras_t* extras = line.extras
    cdef uint64_t mixed
    cdef size_t i
    if line.extra:
        mixed = mix(h)
        i = entry_of(extras, mixed, h)
        if extras.tag[i]:
            return extras.entry[i].seat
        if extras.recent:
            extras = extras.younger
            i = entry_of(extras, mixed, h)
            if extras.tag[i]:
                return extras.entry[i].seat
    return NULL


cdef inline void put_extra(extras_t* extras, Py_hash_t h, PyObject* seat) noexcept nogil:
    """Puts in a seat whose hash nobody has; there is room."""
    cdef uint64_t mixed = mix(h)
    cdef size_t i = entry_of(extras, mixed, h)
    extras.tag[i] = tag_of(mixed)
    extras.entry[i].h = h
    extras.entry[i].seat = seat
    extras.count += 1


cdef inline void put_all(extras_t* extras, extras_t* others) noexcept nogil:
    """Puts in the seats of another table."""
    cdef size_t i
    for i in range(others.mask + 1):
        if others.tag[i]:
            put_extra(extras, others.entry[i].h, others.entry[i].seat)


cdef inline extras_t* new_extras(size_t size) noexcept nogil:
    """A table of that many entries, a power of two; NULL if there is no memory for it."""
    cdef extras_t* extras = <extras_t*>PyMem_RawCalloc(1, sizeof(extras_t) + size)
    cdef entry_t* entry = <entry_t*>PyMem_RawCalloc(size, sizeof(entry_t))
    if extras == NULL or entry == NULL:
        PyMem_RawFree(extras)
        PyMem_RawFree(entry)
        return NULL
    extras.mask = size - 1
    extras.entry = entry
    return extras


cdef inline bint resize_extras(line_t* line, size_t size) noexcept nogil:
    """Gives the older table that many entries; False if there is no memory for it."""
    cdef extras_t* old = line.extras
    cdef extras_t* new = new_extras(size)
    if new == NULL:
        return False
    if old != NULL:
        new.recent = old.recent
        new.younger = old.younger
        put_all(new, old)
        free_extras(old)
    line.extras = new
    return True


cdef inline bint age_extras(line_t* line) noexcept nogil:
    """Moves what is in the younger table to the older one; False if there is no memory for it."""
    cdef extras_t* young = line.extras.younger
    cdef size_t size = line.extras.mask + 1
    while size < 2 * (line.extras.count + young.count):
        size *= 2
    if size > line.extras.mask + 1 and not resize_extras(line, size):
        return False
    put_all(line.extras, young)
    memset(young.tag, 0, YOUNG)
    young.count = line.extras.recent = 0
    return True


cdef inline bint add_extra(line_t* line, Py_hash_t h, object seat) noexcept:
    """Adds a seat whose hash nobody has; False if there is no memory for it."""
    cdef size_t size = 0 if line.extras == NULL else line.extras.mask + 1
    cdef extras_t* young
    # At most half of the entries are taken: then a search ends after one or two.
    if size < YOUNG:
        if not size or 2 * (line.extras.count + 1) > size:
            if not resize_extras(line, 2 * size if size else FEWEST_EXTRAS):
                return False
        put_extra(line.extras, h, <PyObject*>seat)
    else:
        young = line.extras.younger
        if young == NULL:
            young = line.extras.younger = new_extras(YOUNG)
            if young == NULL:
                return False
        elif 2 * (young.count + 1) > YOUNG and not age_extras(line):
            return False
        put_extra(young, h, <PyObject*>seat)
        line.extras.recent = young.count
    Py_INCREF(seat)
    line.extra += 1
    return True


cdef inline void remove_extra(line_t* line, Py_hash_t h) noexcept nogil:
    """Removes the seat with this hash, which is in; it is its caller's now."""
    cdef uint64_t mixed = mix(h)
    cdef extras_t* extras = line.extras
    cdef size_t gap = entry_of(extras, mixed, h)
    cdef size_t i
    if not extras.tag[gap]:
        extras.recent -= 1
        extras = extras.younger
        gap = entry_of(extras, mixed, h)
    i = gap
    while True:
        i = (i + 1) & extras.mask
        if not extras.tag[i]:
            break
        # Whatever was probed for by way of the gap moves into it.
        if ((i - mix(extras.entry[i].h)) & extras.mask) >= ((i - gap) & extras.mask):
            extras.tag[gap] = extras.tag[i]
            extras.entry[gap] = extras.entry[i]
            gap = i
    extras.tag[gap] = 0
    extras.count -= 1
    line.extra -= 1
    extras = line.extras
    if extras.mask >= FEWEST_EXTRAS and 8 * extras.count <= extras.mask:
        resize_extras(line, (extras.mask + 1) // 2)  # if there is memory for it


# -- the leader's path -----------------------------------------------------------------------------


cdef inline Py_hash_t hash_of(object key) except? -1:
    """The hash of a key. Of one with several parts it is made of theirs, without a tuple."""
    if type(key) is tuple and len(<tuple>key) == 3 and (<tuple>key)[0] is SEVERAL:
        return hash_of_parts((<tuple>key)[1], (<tuple>key)[2])
    return hash(key)


cdef inline Py_hash_t hash_of_parts(object part, object more) except? -1:
    return <Py_hash_t>(
        <uint64_t>hash(part) * <uint64_t>0x9E3779B97F4A7C15ULL + <uint64_t>hash(more)
    )


cdef inline PyObject* borrow(object o) noexcept:
    return <PyObject*>o


cdef inline Py_hash_t hash_of_call(PyObject* part, PyObject* more) except? -1:
    """The same as `hash_of(key_of_two(part, more))`."""
    if Py_SIZE(<object>more):
        return hash_of_parts(<object>part, <object>more)
    return hash(<object>part)


cdef inline int64_t next_serial() noexcept nogil:
    global leads
    leads += 1
    return leads


cdef inline uint64_t mixed(Py_hash_t h, int shift) noexcept nogil:
    return (<uint64_t>h * <uint64_t>0x9E3779B97F4A7C15ULL) >> 1 >> shift


cdef inline int check_self(Core core) except -1:
    """Cython does not look at what a method is called with as `self`."""
    if not is_instance(core, <PyTypeObject*>Core):
        raise TypeError(f"do needs a flight, not {<object>core!r}: make one by ShardedFlight()")
    return 0


cdef inline size_t index_of(Core core, Py_hash_t h, PyObject* part, PyObject* more) except? -1:
    """Which line and shard a key is in. Asked once for each call: it may be a hook's answer."""
    if core._hash is not None:
        return core._index(key_of_two(part, more), h)
    return mixed(h, core._shift) if core._mask else 0


cdef inline line_t* line_in(Core core, size_t index) except NULL:
    if core._memory is None:
        # A subclass has not called __init__, or the garbage collector has been here.
        raise RuntimeError("the flight has not been initialised")
    cdef line_t* line = line_among(core._blocks, core._stride, index)
    return line_at(core._memory, index) if line == NULL else line


cdef inline bint is_line(Core core, size_t index, line_t* line) noexcept:
    """Whether the line is still the flight's: it has others in a forked child."""
    return line_among(core._blocks, core._stride, index) == line


cdef inline object key_of_two(PyObject* part, PyObject* more):
    """As `key_of`; `more` is a tuple, or NULL."""
    if more != NULL and Py_SIZE(<object>more):
        return (SEVERAL, <object>part, <object>more)
    return <object>part


cdef inline bint is_made(slot_t* slot) noexcept nogil:
    """Whether the slot holds a seat. Under the lock."""
    return slot.ident == 0 and slot.serial != FREE


cdef inline int find(line_t* line, Py_hash_t h) noexcept nogil:
    """The slot with this hash, or -1. Under the lock."""
    cdef int i
    for i in range(line.top):
        if line.slot[i].h == h and line.slot[i].serial != FREE:
            return i
    return -1


cdef inline void clear(line_t* line, int i) noexcept nogil:
    """Under the lock. The seat, if the slot has one, is its caller's now."""
    line.slot[i].serial = FREE
    line.slot[i].ident = 0
    if i == line.top - 1:
        line.top -= 1
        while line.top > 0 and line.slot[line.top - 1].serial == FREE:
            line.top -= 1


cdef inline int vacant(line_t* line) noexcept nogil:
    """A free slot, or -1. Under the lock."""
    cdef int i
    for i in range(line.top):
        if line.slot[i].serial == FREE:
            return i
    if line.top == line.slots:
        return -1
    line.top += 1
    return line.top - 1


cdef inline int vacated(line_t* line) noexcept:
    """A slot whose seat goes to those for which there is none, or -1. Under the lock."""
    cdef int i
    for i in range(line.top):
        if line.slot[i].serial == LINKED:
            if not add_extra(line, line.slot[i].h, <object>line.slot[i].part):
                return -1
            Py_DECREF(<object>line.slot[i].part)
            return i
    return -1


cdef inline int line_claim(line_t* line, Py_hash_t h, PyObject* part, PyObject* more):
    """Takes a slot for a leader on this thread, and counts its execution."""
    cdef int i
    cdef slot_t* slot
    lock(&line.mutex)
    if find(line, h) >= 0 or in_extras(line, h) != NULL:
        unlock(&line.mutex)
        return TAKEN
    i = vacant(line)
    if i < 0:
        i = vacated(line)
    if i < 0:
        unlock(&line.mutex)
        return FULL
    slot = &line.slot[i]
    slot.h = h
    slot.part = part
    slot.more = more
    slot.ident = get_ident()
    slot.serial = next_serial()
    if line.flags & BESIDE:
        i = LOOK - i
    else:
        line.started += 1
    unlock(&line.mutex)
    return i


cdef inline int line_claim_more(line_t* line, Py_hash_t h, object seat) except? -9:
    """The same for a leader that has found no slot."""
    cdef int claimed = IN_MORE
    lock(&line.mutex)
    if find(line, h) >= 0 or in_extras(line, h) != NULL:
        claimed = TAKEN
    elif not add_extra(line, h, seat):
        claimed = FULL
    elif line.flags & BESIDE:
        claimed = LOOK_IN_MORE
    else:
        line.started += 1
    unlock(&line.mutex)
    if claimed == FULL:
        raise MemoryError
    return claimed


cdef inline object line_seat(line_t* line, int i, PyObject* part, PyObject* more):
    """The seat of the leader on this thread that has slot `i`, or a new one if it has none."""
    cdef object seat
    cdef slot_t* slot
    if i <= LOOK:
        i = LOOK - i
    if i < 0 or i >= IN_MORE:
        return (key_of_two(part, more), get_ident(), next_serial())
    slot = &line.slot[i]
    seat = (key_of_two(part, more), get_ident(), slot.serial)
    lock(&line.mutex)
    if is_made(slot):
        seat = <object>slot.part
    else:
        make_seat(slot, seat)
    unlock(&line.mutex)
    return seat


cdef inline object line_leave(line_t* line, int i):
    """Gives the slot back if nobody has asked for the seat, or else returns the seat.

    It calls and allocates nothing, so it can not fail: what a slot has borrowed ends with its call.
    """
    cdef PyObject* made
    if i <= LOOK:
        i = LOOK - i
    if i < 0 or i >= IN_MORE:
        return None
    lock(&line.mutex)
    made = line.slot[i].part if is_made(&line.slot[i]) else NULL
    if made == NULL:
        clear(line, i)
        unlock(&line.mutex)
        return None
    Py_INCREF(<object>made)
    unlock(&line.mutex)
    seat = <object>made
    Py_DECREF(seat)
    return seat


cdef inline void make_seat(slot_t* slot, object seat) noexcept:
    """From now on the slot holds the seat. Under the lock."""
    Py_INCREF(seat)
    slot.part = <PyObject*>seat
    slot.more = NULL
    slot.ident = 0


cdef inline bint line_pass(line_t* line, int i, PyObject* value) noexcept:
    """Gives the slot back if `value` is all there is to return: nobody has asked for the seat."""
    if value == NULL or type_of(value) == <PyTypeObject*>CoroutineType:
        return False
    lock(&line.mutex)
    if line.slot[i].ident == 0:
        unlock(&line.mutex)
        return False
    clear(line, i)
    unlock(&line.mutex)
    return True


cdef inline object line_release(line_t* line, int i, Py_hash_t h, object seat):
    """Gives the slot back. Returns None, or the seat if it may have been met."""
    cdef PyObject* made
    cdef bint met
    if i == IN_MORE:
        line_unlink(line, h, seat)
        lock(&line.mutex)
        met = line.flags & MET
        unlock(&line.mutex)
        return seat if met else None
    lock(&line.mutex)
    made = line.slot[i].part if line.slot[i].ident == 0 else NULL
    met = line.flags & MET
    clear(line, i)
    unlock(&line.mutex)
    if made == NULL:
        return None
    seat = <object>made
    Py_DECREF(seat)
    return seat if met else None


# -- the table, as Shard has it --------------------------------------------------------------------


cdef inline object line_get(line_t* line, Py_hash_t h):
    """The seat that holds this place, or None."""
    cdef object seat = None
    cdef object part = None
    cdef object more = None
    cdef object found
    cdef int64_t serial = FREE
    cdef unsigned long ident = 0
    cdef slot_t* slot
    cdef PyObject* extra
    cdef int i
    while True:
        lock(&line.mutex)
        i = find(line, h)
        if i < 0:
            extra = in_extras(line, h)
            found = None if extra == NULL else <object>extra
            unlock(&line.mutex)
            return found
        slot = &line.slot[i]
        # The seat was made in the last round, for the lead that has the slot still.
        # Of a thread that has ended another one may have the ident, and counts anew; but nobody
        # else has the parts, as long as they are held here.
        if (seat is not None and slot.ident == ident and slot.serial == serial
                and slot.part == <PyObject*>part and slot.more == <PyObject*>more):
            make_seat(slot, seat)
        if is_made(slot):
            found = <object>slot.part
            unlock(&line.mutex)
            return found
        part = <object>slot.part
        more = <object>slot.more
        serial = slot.serial
        ident = slot.ident
        unlock(&line.mutex)
        seat = (key_of_two(<PyObject*>part, <PyObject*>more), ident, serial)


cdef inline bint line_taken(line_t* line, Py_hash_t h):
    """Whether somebody has this place, or might stand beside it."""
    cdef bint taken
    lock(&line.mutex)
    taken = find(line, h) >= 0 or line.flags & BESIDE or in_extras(line, h) != NULL
    unlock(&line.mutex)
    return taken


cdef inline object line_link(line_t* line, Py_hash_t h, object seat):
    """Links the seat if the place is free. Returns the seat that holds it then."""
    cdef object holder
    cdef bint linked
    cdef int i
    while True:
        lock(&line.mutex)
        if find(line, h) < 0 and in_extras(line, h) == NULL:
            break
        unlock(&line.mutex)
        holder = line_get(line, h)
        if holder is not None:
            return holder
    i = vacant(line)
    if i < 0:
        linked = add_extra(line, h, seat)
    else:
        linked = True
        line.slot[i].h = h
        line.slot[i].serial = LINKED
        make_seat(&line.slot[i], seat)
    unlock(&line.mutex)
    if not linked:
        raise MemoryError
    return seat


cdef inline bint line_unlink(line_t* line, Py_hash_t h, object seat) except -1:
    """Unlinks the seat; False if it does not hold the place."""
    cdef bint linked
    cdef int i
    lock(&line.mutex)
    i = find(line, h)
    if i >= 0:
        linked = is_made(&line.slot[i]) and line.slot[i].part == <PyObject*>seat
        if linked:
            clear(line, i)
    else:
        linked = in_extras(line, h) == <PyObject*>seat
        if linked:
            remove_extra(line, h)
    unlock(&line.mutex)
    if linked:
        Py_DECREF(seat)
    return linked


cdef inline list line_seats(line_t* line):
    """All seats, with the hashes of their keys."""
    cdef list found = []
    cdef Py_hash_t* hashes = NULL
    cdef size_t room = 0
    cdef size_t count = 0
    cdef size_t i
    cdef extras_t* extras
    lock(&line.mutex)
    while room < line.top + <size_t>line.extra:
        room = 2 * (line.top + <size_t>line.extra)
        unlock(&line.mutex)
        PyMem_RawFree(hashes)
        hashes = <Py_hash_t*>PyMem_RawCalloc(room, sizeof(Py_hash_t))
        if hashes == NULL:
            raise MemoryError
        lock(&line.mutex)
    for i in range(line.top):
        if line.slot[i].serial != FREE:
            hashes[count] = line.slot[i].h
            count += 1
    extras = line.extras
    if extras != NULL:
        count += copy_hashes(extras, hashes + count)
        count += copy_hashes(extras.younger, hashes + count)
    unlock(&line.mutex)
    try:
        for i in range(count):
            seat = line_get(line, hashes[i])
            if seat is not None:
                found.append((hashes[i], seat))
    finally:
        PyMem_RawFree(hashes)
    return found


cdef inline void line_count(line_t* line) noexcept nogil:
    lock(&line.mutex)
    line.started += 1
    unlock(&line.mutex)


cdef inline void line_mark(line_t* line, bint met, bint beside) noexcept nogil:
    lock(&line.mutex)
    line.flags = (MET if met else 0) | (BESIDE if beside else 0)
    unlock(&line.mutex)


# -- all lines -------------------------------------------------------------------------------------


cdef inline int64_t lines_started(object memory):
    cdef lines_t* lines = lines_of(memory)
    cdef line_t* line
    cdef int64_t started = 0
    cdef size_t i
    for i in range(lines.count):
        line = line_made(lines, i)
        if line == NULL:
            continue
        lock(&line.mutex)
        started += line.started
        unlock(&line.mutex)
    return started


cdef inline bint lines_idle(object memory) except -1:
    """Whether nobody leads, neither in a line nor beside one."""
    cdef lines_t* lines = lines_of(memory)
    cdef line_t* line
    cdef bint idle
    cdef size_t i
    for i in range(lines.count):
        line = line_made(lines, i)
        if line == NULL:
            continue
        lock(&line.mutex)
        idle = line.top == 0 and line.extra == 0 and not line.flags & BESIDE
        unlock(&line.mutex)
        if not idle:
            return False
    return True


cdef inline list lines_running(object memory):
    """How many seats each line has."""
    cdef lines_t* lines = lines_of(memory)
    cdef line_t* line
    cdef list running = []
    cdef size_t i
    cdef int s
    cdef uint32_t found
    for i in range(lines.count):
        line = line_made(lines, i)
        if line == NULL:
            running.append(0)
            continue
        lock(&line.mutex)
        found = line.extra
        for s in range(line.top):
            if line.slot[s].serial != FREE:
                found += 1
        unlock(&line.mutex)
        running.append(found)
    return running


# -- the types of _core.py -------------------------------------------------------------------------

cdef object NO_PART, SEVERAL, NONE_MORE, CoroutineType

cdef inline object id(object o):
    """As the built-in, without the call."""
    return <uintptr_t><PyObject*>o


cdef inline object peek(dict d, object key):
    """As `d.get(key)`, which Cython borrows from: another thread may drop the item."""
    cdef PyObject* item
    cdef object found = None
    if dict_find(d, key, &item):
        found = <object>item
        Py_DECREF(found)
    return found


cdef class Execution:
    cdef public object seat, leader, predecessor, end, value, failure
    cdef public dict waiters
    cdef public bint joinable, passed_over, attended, abroad, inherited, announced, linked, shared
    cdef public int64_t serial

cdef class Shard:
    cdef object _memory
    cdef line_t* _line
    cdef public object lock
    cdef public dict met, overflow
    cdef public int64_t overflow_changes, shared, errors, promotions, timeouts
    cdef public int64_t abandoned, forgotten, deadlocks
    # Of the plain form.
    cdef public object table, started, _started_reads

    cpdef object get(self, Py_hash_t h)
    cpdef object link(self, Py_hash_t h, object seat)
    cpdef bint unlink(self, Py_hash_t h, object seat) except -1
    cpdef object count(self)
    cpdef bint taken(self, Py_hash_t h) except -1
    cpdef bint claim(self, Py_hash_t h, object seat) except -1
    cpdef bint release(self, Py_hash_t h, object seat) except -1
    cpdef object follow(self, Py_hash_t h, object key, object waiter, object loop)
    cdef object _mark(self)
    cdef object _fence(self)
    cdef object _meet(self, Py_hash_t h, object seat)
    cdef bint _lead(self, Py_hash_t h, object seat) except -1
    cdef object _match(self, Py_hash_t h, object key, object head, object mine)
    cdef bint _matches(self, object seat, object key) except -1
    cdef bint _link_beside(self, Py_hash_t h, object seat, object head) except -1
    cdef object _remove_from_overflow(self, Py_hash_t h, object seat)
    cdef object _change_overflow(self, Py_hash_t h, object group)
    cdef object _deserted(self, Execution record)

cdef class Core:
    cdef object _memory, _old_memory
    cdef char** _blocks
    cdef size_t _stride
    cdef object _build_key, _hash
    cdef size_t _mask
    cdef int _shift
    cdef public object _shards, _single
    cdef public bint _wraps
    cdef bint _indirect

    cpdef tuple _place(self, tuple parts)
    cpdef tuple _look(self, tuple parts)
    cdef object _built(self, object part, tuple more)
    cdef object _serve(self, Shard shard, Py_hash_t h, object seat, object value)
    cdef object _refuse(self, Shard shard, Py_hash_t h, object seat, object value)
    cdef Shard _shard_of(self, object key, Py_hash_t h)
    cdef Shard _shard_at(self, size_t index)
    cdef object _index(self, object key, Py_hash_t h)

cpdef object key_of(tuple parts)
cpdef tuple parts_of(object part, tuple more)

cdef object end_badly(Core core, size_t index, Py_hash_t h, object seat, bint led, object error)
cpdef object settle_badly(
    Core core, size_t index, Py_hash_t h, object seat, bint led, object error
)
cdef int count_served(dict waiters) except -1
