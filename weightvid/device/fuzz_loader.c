/* libFuzzer: a whole archive in every way of reading it. The last four bytes of an input may say how
   many before them are the base of an update, which comes first; without that it is its own. The
   pictures are made up: the decoder has a fuzzer of its own. Build with -DWEIGHTVID_FUZZ, so that hashes
   match whatever they are, and start from archives whose bodies are not deflated (form 0):

   clang -g -O1 -fsanitize=fuzzer,address,undefined -DWEIGHTVID_FUZZ -ffp-contract=off \
       fuzz_loader.c weightvid.c hevc.c -o fuzz_loader
   ./fuzz_loader -max_len=65536 CORPUS

   With -DWV_FUZZ_MAIN instead of -fsanitize=fuzzer: a program that reads the files it is given. */
#include "weightvid.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64 << 20 };

typedef struct pictures {
    uint8_t *luma;
    size_t width, height;
} pictures;

static wv_status open_track(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                            uint32_t width, uint32_t height)
{
    pictures *p = user;
    (void)entry;
    (void)config;
    (void)bytes;
    p->width = width;
    p->height = height;
    p->luma = malloc((size_t)width * height);
    return p->luma ? WV_OK : WV_MEMORY;
}

static wv_status decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                        size_t *stride)
{
    pictures *p = user;
    if (packet[0] == 0xFF)
        return WV_CODEC;
    memset(p->luma, packet[bytes / 2], p->width * p->height);
    memcpy(p->luma, packet, bytes < p->width * p->height ? bytes : p->width * p->height);
    *luma = p->luma;
    *stride = p->width;
    return WV_OK;
}

static void close_track(void *user)
{
    pictures *p = user;
    free(p->luma);
    p->luma = NULL;
}

static void *begin(void *user, const wv_tensor *tensor, size_t bytes)
{
    (void)user;
    return bytes < MOST && tensor->number % 7 != 3 ? malloc(bytes ? bytes : 1) : NULL;
}

static void end(void *user, const wv_tensor *tensor, void *room, wv_status status)
{
    (void)user;
    (void)tensor;
    (void)status;
    free(room);
}

static void read_all(wv_archive *archive, const wv_sink *sink)
{
    const char *first, *second;
    uint64_t bytes;
    wv_metadata(archive, 0, &first, &second);
    if (!wv_file(archive, 0, &first, &bytes) && bytes < MOST) {
        void *room = malloc((size_t)bytes + 1);
        wv_read_file(archive, 0, room, (size_t)bytes);
        free(room);
    }
    for (uint32_t i = 0; i < wv_count(archive) && i < 8; i++) {
        const wv_tensor *tensor = wv_get(archive, i);
        const size_t size = wv_bytes(tensor, sink->type);
        float step;
        wv_find(archive, tensor->name);
        if (tensor->elements > MOST / 16)
            continue;
        void *room = malloc(size ? size : 1);
        wv_load(archive, tensor, sink->type, room, size);
        free(room);
        room = malloc(4 * (size_t)tensor->elements + 1);
        wv_levels(archive, tensor, room, 4 * (size_t)tensor->elements, &step);
        free(room);
    }
    wv_load_all(archive, sink);
}

typedef struct bytes {
    uint8_t *data;
    size_t size;
} bytes;

/* In memory of just its size, so that reading behind it is noticed. */
static bytes copy(const uint8_t *data, size_t size)
{
    const bytes made = {malloc(size ? size : 1), size};
    if (!made.data)
        abort();
    memcpy(made.data, data, size);
    return made;
}

static int read_at(void *user, uint64_t offset, void *out, size_t size)
{
    const bytes *from = user;
    if (offset > from->size || size > from->size - offset)
        abort();
    memcpy(out, from->data + offset, size);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pictures shown[3] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}};
    wv_decoder decoders[3];
    for (int i = 0; i < 3; i++)
        decoders[i] = (wv_decoder){&shown[i], open_track, decode, close_track};
    wv_options options = {{NULL, NULL, NULL}, &decoders[0], size % 8 ? WV_CHECK_NONE : WV_CHECK_ALL};
    const wv_sink sink = {NULL, size % 3 == 0 ? WV_STORED : size % 3 == 1 ? WV_F32 : WV_F16, begin, end};
    uint32_t base_size = 0, layers;
    for (uint32_t i = 0; i < 4 && size >= 4; i++)
        base_size |= (uint32_t)data[size - 4 + i] << 8 * i;
    const size_t some = base_size && size >= 4 && base_size <= size - 4 ? size - 4 - base_size : size;
    bytes whole = copy(data, some), below = some < size ? copy(data + some, base_size) : copy(data, size);
    const wv_reader reader = {&whole, whole.size, read_at};
    wv_archive *base, *archive;
    if (!wv_open_memory(&base, below.data, below.size, &options))
        read_all(base, &sink);
    options.decoder = &decoders[1];
    if (!wv_open_reader(&archive, &reader, &options)) {
        wv_use_base(archive, base);
        wv_use_layers(archive, (uint32_t)(1 + size % 4));
        read_all(archive, &sink);
        wv_close(archive);
    }
    options.decoder = &decoders[2];
    if (!wv_open_stream(&archive, &sink, &options)) {
        wv_use_base(archive, base);
        wv_use_layers(archive, (uint32_t)(1 + size % 5));
        for (size_t at = 0; at < whole.size; at += 1000)
            wv_push(archive, whole.data + at, whole.size - at < 1000 ? whole.size - at : 1000);
        wv_layers(archive, &layers);
        wv_finish(archive);
        wv_close(archive);
    }
    wv_close(base);
    free(whole.data);
    free(below.data);
    return 0;
}

#ifdef WV_FUZZ_MAIN
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file || fseek(file, 0, SEEK_END))
            return 1;
        const size_t size = (size_t)ftell(file);
        uint8_t *data = malloc(size + 1);
        rewind(file);
        if (!data || fread(data, 1, size, file) != size)
            return 1;
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
        free(data);
    }
    return 0;
}
#endif
