/* What the browser's module needs beside the loader: memory, and functions that JavaScript calls.

   JavaScript waits for the network and for WebCodecs, C doesn't. So the reader and the decoder below
   answer from what has been given to them, and fail where something is missing; JavaScript looks at
   `wanted`, gets it, and calls again. Built by tools/build_wasm. */
#include "weightvid.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT(name) __attribute__((export_name(name)))

/* --- the C library, as far as it is used ------------------------------------------------------ */

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    return __builtin_memcpy(to, from, size);
}

void *memmove(void *to, const void *from, size_t size)
{
    return __builtin_memmove(to, from, size);
}

void *memset(void *to, int value, size_t size)
{
    return __builtin_memset(to, value, size);
}

int memcmp(const void *one, const void *other, size_t size)
{
    const uint8_t *a = one, *b = other;
    for (; size; size--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t strlen(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

/* First fit among free blocks, which are listed by address and joined with their neighbours. */
typedef struct block {
    size_t bytes; /* with this head */
    struct block *next;
} block;

extern unsigned char __heap_base;
static block *free_blocks;
static uintptr_t heap_end;

void free(void *memory)
{
    block *made = (block *)memory - 1, **at = &free_blocks;
    if (!memory)
        return;
    while (*at && *at < made)
        at = &(*at)->next;
    made->next = *at;
    *at = made;
    for (block *b = free_blocks; b && b <= made; b = b->next)
        while (b->next && (uintptr_t)b + b->bytes == (uintptr_t)b->next) {
            b->bytes += b->next->bytes;
            b->next = b->next->next;
        }
}

void *malloc(size_t bytes)
{
    const size_t page = 65536, most = (size_t)1 << 31; /* JavaScript sees higher addresses as negative */
    if (bytes > most)
        return NULL;
    bytes = (bytes + sizeof(block) + 15) & ~(size_t)15;
    for (int turn = 0; turn < 2; turn++) {
        for (block **at = &free_blocks; *at; at = &(*at)->next) {
            block *found = *at;
            if (found->bytes < bytes)
                continue;
            if (found->bytes - bytes >= 64) {
                block *rest = (block *)((uintptr_t)found + bytes);
                rest->bytes = found->bytes - bytes;
                rest->next = found->next;
                *at = rest;
                found->bytes = bytes;
            } else {
                *at = found->next;
            }
            return found + 1;
        }
        size_t grown = bytes > 4 * page ? bytes : 4 * page;
        if (!heap_end)
            heap_end = ((uintptr_t)&__heap_base + 15) & ~(uintptr_t)15;
        if (grown > most - heap_end)
            return NULL;
        uintptr_t have = __builtin_wasm_memory_size(0) * page;
        if (heap_end + grown > have
            && __builtin_wasm_memory_grow(0, (heap_end + grown - have + page - 1) / page) == (size_t)-1)
            return NULL;
        block *made = (block *)heap_end;
        made->bytes = grown;
        heap_end += grown;
        free(made + 1);
    }
    return NULL;
}

EXPORT("alloc") void *js_alloc(size_t bytes)
{
    return malloc(bytes);
}

EXPORT("release") void js_release(void *memory)
{
    free(memory);
}

/* --- an archive ------------------------------------------------------------------------------- */

typedef struct piece { /* of the file, or a picture by the hash of its packet */
    uint64_t at;
    size_t bytes;
    uint8_t *data;
    struct piece *next;
} piece;

typedef struct arrived { /* made before the tensor arrives, so that `end` needs no memory */
    const wv_tensor *tensor;
    void *room;
    size_t bytes, coarse;
    struct arrived *next;
    uint64_t data[];
} arrived;

typedef struct session {
    wv_archive *archive;
    arrived *first, *last; /* tensors of a stream that JavaScript has not taken */
    piece *file, *pictures;
    wv_decoder decoder;
    wv_sink sink;
    int full; /* there was no memory for a tensor of the stream */
    uint64_t size;
    uint32_t width, height;
    /* What is missing: 0 nothing, 1 a piece of the file, 2 the picture of a packet. */
    uint32_t wanted, wanted_bytes;
    double wanted_at;
    const uint8_t *packet;
    uint8_t *config;
    uint32_t config_bytes;
    char entry[4];
} session;

static void *begin(void *user, const wv_tensor *tensor, size_t bytes)
{
    session *s = user;
    arrived *made = bytes > SIZE_MAX / 2 ? NULL : malloc(sizeof *made + bytes);
    if (!made) {
        s->full = 1; /* NULL alone would skip the tensor */
        return NULL;
    }
    *made = (arrived){.tensor = tensor, .room = made->data, .bytes = bytes};
    return made->data;
}

static void end(void *user, const wv_tensor *tensor, void *room, wv_status status)
{
    session *s = user;
    arrived *made = (arrived *)((uint8_t *)room - offsetof(arrived, data));
    (void)tensor;
    if (status && status != WV_COARSE) {
        free(made);
        return;
    }
    made->coarse = status == WV_COARSE;
    if (s->last)
        s->last->next = made;
    else
        s->first = made;
    s->last = made;
}

static int read_piece(void *user, uint64_t at, void *out, size_t bytes)
{
    session *s = user;
    for (piece *p = s->file; p; p = p->next)
        if (at >= p->at && at + bytes <= p->at + p->bytes) {
            memcpy(out, p->data + (at - p->at), bytes);
            return 0;
        }
    s->wanted = 1;
    s->wanted_at = (double)at;
    s->wanted_bytes = (uint32_t)bytes;
    return 1;
}

static uint64_t hash_of(const uint8_t *data, size_t bytes)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ data[i]) * 1099511628211u;
    return hash;
}

static wv_status open_track(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                            uint32_t width, uint32_t height)
{
    session *s = user;
    uint8_t *copy = malloc(bytes + 1);
    if (!copy)
        return WV_MEMORY;
    memcpy(copy, config, bytes);
    memcpy(s->entry, entry, 4);
    free(s->config); /* a file is opened again when more of it is there */
    s->config = copy;
    s->config_bytes = (uint32_t)bytes;
    s->width = width;
    s->height = height;
    return WV_OK;
}

static wv_status decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma, size_t *stride)
{
    session *s = user;
    uint64_t hash = hash_of(packet, bytes);
    for (piece *p = s->pictures; p; p = p->next)
        if (p->at == hash) {
            *luma = p->data;
            *stride = s->width;
            return WV_OK;
        }
    s->wanted = 2;
    s->packet = packet;
    s->wanted_bytes = (uint32_t)bytes;
    return WV_CODEC;
}

static void close_track(void *user)
{
    (void)user;
}

static void drop(piece **list)
{
    while (*list) {
        piece *gone = *list;
        *list = gone->next;
        free(gone->data);
        free(gone);
    }
}

/* A session: `size` 0 for a stream. `external`: JavaScript decodes. `type`: of floats. */
EXPORT("open") session *js_open(double size, int external, int type)
{
    session *s = malloc(sizeof *s);
    if (!s)
        return NULL;
    memset(s, 0, sizeof *s);
    s->sink = (wv_sink){s, (wv_dtype)type, begin, end};
    s->size = (uint64_t)size;
    s->decoder = (wv_decoder){s, open_track, decode, close_track};
    wv_options options = {{NULL, NULL, NULL}, external ? &s->decoder : NULL, WV_CHECK_FRAMES};
    if (!s->size && wv_open_stream(&s->archive, &s->sink, &options)) {
        free(s);
        return NULL;
    }
    return s;
}

/* Opens the file of a session that is no stream; to be called again while something is wanted. */
EXPORT("start") wv_status js_start(session *s, int external)
{
    wv_reader reader = {s, s->size, read_piece};
    wv_options options = {{NULL, NULL, NULL}, external ? &s->decoder : NULL, WV_CHECK_FRAMES};
    s->wanted = 0;
    return wv_open_reader(&s->archive, &reader, &options);
}

EXPORT("use_base") wv_status js_use_base(session *s, session *base)
{
    return wv_use_base(s->archive, base->archive);
}

EXPORT("use_layers") wv_status js_use_layers(session *s, uint32_t layers)
{
    return wv_use_layers(s->archive, layers);
}

/* Two numbers: layers of the archive, and those that have arrived of a stream. */
EXPORT("layers") const uint32_t *js_layers(session *s)
{
    static uint32_t found[2];
    found[0] = wv_layers(s->archive, found + 1);
    return found;
}

EXPORT("push") wv_status js_push(session *s, const uint8_t *data, size_t bytes)
{
    const wv_status status = wv_push(s->archive, data, bytes);
    return s->full ? WV_MEMORY : status;
}

EXPORT("finish") wv_status js_finish(session *s)
{
    const wv_status status = wv_finish(s->archive);
    return s->full ? WV_MEMORY : status;
}

/* The next tensor that has arrived: tensor, room, bytes, whether it is coarse. It is the caller's to release. */
EXPORT("next") arrived *js_next(session *s)
{
    arrived *found = s->first;
    if (found) {
        s->first = found->next;
        if (!s->first)
            s->last = NULL;
    }
    return found;
}

/* Takes data, which the session releases: kind 1: bytes of the file; 2: luma of the wanted packet. 0: no memory. */
EXPORT("give") int js_give(session *s, int kind, double at, uint8_t *data, size_t bytes)
{
    piece *made = malloc(sizeof *made);
    if (!made) {
        free(data);
        return 0;
    }
    piece **list = kind == 1 ? &s->file : &s->pictures;
    uint64_t key = kind == 1 ? (uint64_t)at : hash_of(s->packet, s->wanted_bytes);
    *made = (piece){key, bytes, data, *list};
    *list = made;
    s->wanted = 0;
    return 1;
}

EXPORT("forget") void js_forget(session *s)
{
    drop(&s->file);
    drop(&s->pictures);
}

EXPORT("load") wv_status js_load(session *s, const wv_tensor *tensor, int type, void *out, size_t bytes)
{
    s->wanted = 0;
    return wv_load(s->archive, tensor, (wv_dtype)type, out, bytes);
}

EXPORT("close") void js_close(session *s)
{
    wv_close(s->archive);
    for (arrived *a = js_next(s); a; a = js_next(s))
        free(a);
    js_forget(s);
    free(s->config);
    free(s);
}

/* What is wanted, its bytes, packet; of the track: configuration, its bytes, width, height. */
EXPORT("fields") const uint32_t *js_fields(session *s)
{
    static uint32_t found[7];
    found[0] = s->wanted;
    found[1] = s->wanted_bytes;
    found[2] = (uint32_t)(uintptr_t)s->packet;
    found[3] = (uint32_t)(uintptr_t)s->config;
    found[4] = s->config_bytes;
    found[5] = s->width;
    found[6] = s->height;
    return found;
}

EXPORT("wanted_at") double js_wanted_at(session *s)
{
    return s->wanted_at;
}

EXPORT("entry") const char *js_entry(session *s)
{
    return s->entry;
}

EXPORT("count") uint32_t js_count(session *s)
{
    return wv_count(s->archive);
}

EXPORT("tensor") const wv_tensor *js_tensor(session *s, uint32_t place)
{
    return wv_get(s->archive, place);
}

EXPORT("bytes") size_t js_bytes(const wv_tensor *tensor, int type)
{
    return wv_bytes(tensor, (wv_dtype)type);
}

/* Key and value number `place` of the metadata, as two addresses; NULL behind the last. Each ends at its
   first zero byte, even where the archive has text behind it: wv_metadata tells no lengths. */
EXPORT("metadata") const char **js_metadata(session *s, uint32_t place)
{
    static const char *pair[2];
    return wv_metadata(s->archive, place, pair, pair + 1) ? NULL : pair;
}

EXPORT("status_text") const char *js_status_text(int status)
{
    return wv_status_text((wv_status)status);
}
