/* weightvid: reads neural-network weights out of a video file (FORMAT.md, format 1.0).

   C99; needs the C library only. Compile with -ffp-contract=off: a fused multiplication and
   addition would give other bits. weightvid.c reads archives, hevc.c decodes their pictures.

   No global state: archives may be used in several threads, each archive (with its base) in one at
   a time. All memory comes from the caller's allocator. Beside the tensors that are returned, the
   peak is

     the header and the index, inflated      + 90 bytes a name, 8 an axis
     + one picture (width x height bytes)    + the built-in decoder's lines (wv_hevc_memory)
     + the largest packet and sidecar        from memory: packets are not copied
     + the sidecar of a part that goes on in the next frame

   wv_scratch_bytes() tells the first two lines. The packet's memory is used again once its picture is
   decoded, and is larger where that is not enough: a part needs 4 bytes a row and a column, then 4 a
   column, or 8 and 4 K^2 with kernels of K positions; bit-exact floats need up to 4 bytes an element of
   their box. The body of a box of exact tensors lies where sidecars do. There is more only where an
   archive has it: in a layer that is added a byte a level of a part; and the elements of a tensor once
   more while a layer is added to it in several parts or boxes, or if another type than its own is
   wanted. */
#ifndef WEIGHTVID_H
#define WEIGHTVID_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum wv_status {
    WV_OK = 0,
    WV_ARGUMENT,    /* a NULL pointer, a number out of range, or a wrong order of calls */
    WV_MEMORY,      /* the allocator gave nothing */
    WV_READ,        /* the read callback failed */
    WV_NOT_FOUND,   /* no tensor or file of that name */
    WV_TRUNCATED,   /* the file ends early */
    WV_NO_ARCHIVE,  /* no archive of this format */
    WV_VERSION,     /* a record, method or field of a later format */
    WV_LIMIT,       /* a number above its limit */
    WV_FORMAT,      /* boxes, records or fields that do not fit each other */
    WV_DIGEST,      /* a CRC-32 or SHA-256 does not match: damaged */
    WV_CODEC,       /* the decoder refused the track or a packet */
    WV_LEVELS,      /* the tensor has no integers to compute with: pack with --integer */
    WV_BASE,        /* an update without its base, with another one, or a base for what is no update */
    WV_COARSE       /* of a tensor: the file ends early, but its lower layers are there */
} wv_status;

/* Element types, by their codes in the format. */
typedef enum wv_dtype {
    WV_F64, WV_F32, WV_F16, WV_BF16, WV_F8_E4M3, WV_F8_E5M2, WV_F8_E8M0, WV_F8_E4M3FNUZ,
    WV_F8_E5M2FNUZ, WV_F6_E2M3, WV_F6_E3M2, WV_F4, WV_C64, WV_C128, WV_C32, WV_I64, WV_I32, WV_I16,
    WV_I8, WV_U64, WV_U32, WV_U16, WV_U8, WV_BOOL,
    WV_STORED = 255 /* as a wanted type: the tensor's own */
} wv_dtype;

typedef struct wv_archive wv_archive;

typedef struct wv_tensor {
    const char *name;      /* UTF-8, ends with a zero byte */
    size_t name_bytes;     /* without it; names may hold zero bytes themselves */
    wv_dtype dtype;
    uint32_t axes;
    const uint64_t *shape; /* so many sizes, row-major order */
    uint64_t elements;
    uint32_t number;       /* of the tensor; that of another one for an alias */
    uint32_t alias;        /* 1: another name of that tensor */
} wv_tensor;

typedef struct wv_allocator {
    void *user;
    void *(*alloc)(void *user, size_t bytes); /* aligned as malloc's; NULL: there is none */
    void (*free)(void *user, void *memory);
} wv_allocator;

/* Decoder of the track. `open` gets the sample entry ("hvc1", "av01", "avc1") and the payload of
   its configuration box. `decode` gets one sample (hvc1, avc1: NAL units behind 4-byte lengths) and
   returns the luma of its picture, valid until the next call and not in the packet's memory, and the
   distance of its rows; it must refuse a picture that is not of the size that `open` got: this is not
   compared. Each picture's SHA-256 is: a decoder that is not exact is noticed. */
typedef struct wv_decoder {
    void *user;
    wv_status (*open)(void *user, const char entry[4], const uint8_t *config, size_t config_bytes,
                      uint32_t width, uint32_t height);
    wv_status (*decode)(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                        size_t *stride);
    void (*close)(void *user); /* NULL: there is nothing to close */
} wv_decoder;

typedef enum wv_checks {
    WV_CHECK_FRAMES, /* default: the SHA-256 of every picture, and the CRC-32 of every box */
    WV_CHECK_ALL,    /* and that of every tensor */
    WV_CHECK_NONE    /* boxes only: for files whose hash has been checked */
} wv_checks;

/* Zero it for the defaults: malloc, the built-in decoder, checks of frames. */
typedef struct wv_options {
    wv_allocator allocator; /* alloc NULL: malloc and free */
    const wv_decoder *decoder; /* NULL: the built-in one; must outlive the archive */
    wv_checks checks;
} wv_options;

/* Random access: `read` fills `out` with `bytes` bytes from `offset`; 0: done, others: failed. */
typedef struct wv_reader {
    void *user;
    uint64_t size;
    int (*read)(void *user, uint64_t offset, void *out, size_t bytes);
} wv_reader;

/* Takes tensors as they arrive. `begin` gives room for `bytes` bytes, aligned for the type, or NULL
   to skip the tensor. `end` is called for each room that was given: status WV_OK, or why it is not
   filled (its contents are of no use then, but those of WV_COARSE). `type` is the wanted type of
   floats: WV_STORED, WV_F32, WV_F16; other tensors come in their own. */
typedef struct wv_sink {
    void *user;
    wv_dtype type;
    void *(*begin)(void *user, const wv_tensor *tensor, size_t bytes);
    void (*end)(void *user, const wv_tensor *tensor, void *room, wv_status status);
} wv_sink;

/* --- open and close: *archive is NULL if that fails; memory and reader must outlive it */
wv_status wv_open_memory(wv_archive **archive, const void *data, size_t size, const wv_options *options);
wv_status wv_open_reader(wv_archive **archive, const wv_reader *reader, const wv_options *options);
/* Bytes are pushed in pieces of any size; tensors come out to the sink, which must outlive it, when
   all their layers are there. */
wv_status wv_open_stream(wv_archive **archive, const wv_sink *sink, const wv_options *options);
wv_status wv_push(wv_archive *archive, const void *data, size_t size);
/* WV_OK: the whole archive has arrived. WV_TRUNCATED: tensors that came out are right; those whose
   lower layers alone are there come out with WV_COARSE, as the sum of these. */
wv_status wv_finish(wv_archive *archive);
void wv_close(wv_archive *archive);
/* Before tensors are read, or the first byte is pushed. What an update adds to: an archive that is
   open from memory or a reader, and outlives it; its own base, if it is an update, is set before. */
wv_status wv_use_base(wv_archive *archive, wv_archive *base);
/* Read the first so many layers of an archive of several. */
wv_status wv_use_layers(wv_archive *archive, uint32_t layers);

/* --- what is in it (of a stream: nothing before its header has arrived) */
uint32_t wv_count(const wv_archive *archive); /* names: tensors, then aliases */
const wv_tensor *wv_get(const wv_archive *archive, uint32_t place);
const wv_tensor *wv_find(const wv_archive *archive, const char *name);
/* Number `place` of the metadata or side files; WV_NOT_FOUND behind the last. Texts end with a zero
   byte and belong to the archive. */
wv_status wv_metadata(const wv_archive *archive, uint32_t place, const char **key, const char **value);
wv_status wv_file(const wv_archive *archive, uint32_t place, const char **path, uint64_t *bytes);
wv_status wv_read_file(wv_archive *archive, uint32_t place, void *out, size_t bytes);
size_t wv_scratch_bytes(const wv_archive *archive);
/* Layers of the archive; and how many of them, at the start, have arrived of a stream for all tensors
   (`arrived` may be NULL). */
uint32_t wv_layers(const wv_archive *archive, uint32_t *arrived);

/* --- tensors of this archive, from memory or a reader; wv_load and wv_levels need the index, at the
   end of the file */
size_t wv_bytes(const wv_tensor *tensor, wv_dtype type); /* of a tensor in a type; 0: impossible */
wv_status wv_load(wv_archive *archive, const wv_tensor *tensor, wv_dtype type, void *out, size_t bytes);
wv_status wv_load_all(wv_archive *archive, const wv_sink *sink);
/* Integers of a tensor packed with --integer: weight = level x step; int32, 4 x elements bytes. */
wv_status wv_levels(wv_archive *archive, const wv_tensor *tensor, int32_t *out, size_t bytes, float *step);

const char *wv_status_text(wv_status status);

#ifdef __cplusplus
}
#endif
#endif
