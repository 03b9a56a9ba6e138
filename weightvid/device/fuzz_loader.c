/* libFuzzer: a whole archive in every way of reading it, also as an update to itself. The pictures
   are made up: the decoder has a fuzzer of its own. Build with -DWEIGHTVID_FUZZ, so that hashes match
   whatever they are, and start from archives whose bodies are not deflated (form 0):

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pictures shown[3] = {{NULL, 0, 0}, {NULL, 0, 0}, {NULL, 0, 0}};
    wv_decoder decoders[3];
    for (int i = 0; i < 3; i++)
        decoders[i] = (wv_decoder){&shown[i], open_track, decode, close_track};
    wv_options options = {{NULL, NULL, NULL}, &decoders[0], size % 8 ? WV_CHECK_NONE : WV_CHECK_ALL};
    const wv_sink sink = {NULL, size % 3 == 0 ? WV_STORED : size % 3 == 1 ? WV_F32 : WV_F16, begin, end};
    wv_archive *archive, *update;
    if (!wv_open_memory(&archive, data, size, &options)) {
        read_all(archive, &sink);
        options.decoder = &decoders[1];
        if (!wv_open_memory(&update, data, size, &options)) {
            wv_use_base(update, archive);
            wv_use_layers(update, 1 + size % 4);
            read_all(update, &sink);
            wv_close(update);
        }
    }
    options.decoder = &decoders[2];
    if (!wv_open_stream(&update, &sink, &options)) {
        wv_use_base(update, archive);
        for (size_t at = 0; at < size; at += 1000)
            wv_push(update, data + at, size - at < 1000 ? size - at : 1000);
        uint32_t layers;
        wv_layers(update, &layers);
        wv_finish(update);
        wv_close(update);
    }
    wv_close(archive);
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
        /* In memory of just its size, so that reading behind it is noticed. */
        uint8_t *exact = malloc(size ? size : 1);
        memcpy(exact, data, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        free(data);
    }
    return 0;
}
#endif
