/* libFuzzer: a whole archive in every way of reading it. Build with -DWEIGHTVID_FUZZ, so that hashes
   match whatever they are:

   clang -g -O1 -fsanitize=fuzzer,address,undefined -DWEIGHTVID_FUZZ -ffp-contract=off \
       fuzz_loader.c weightvid.c hevc.c -o fuzz_loader
   ./fuzz_loader -max_len=65536 CORPUS */
#include "weightvid.h"

#include <stdlib.h>

enum { MOST = 64 << 20 };

static void *begin(void *user, const wv_tensor *tensor, size_t bytes)
{
    (void)user;
    (void)tensor;
    return bytes < MOST ? malloc(bytes ? bytes : 1) : NULL;
}

static void end(void *user, const wv_tensor *tensor, void *room, wv_status status)
{
    (void)user;
    (void)tensor;
    (void)status;
    free(room);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const wv_options options = {{NULL, NULL, NULL}, NULL, WV_CHECK_ALL};
    const wv_sink sink = {NULL, size % 3 == 0 ? WV_STORED : size % 3 == 1 ? WV_F32 : WV_F16, begin, end};
    wv_archive *archive;
    if (!wv_open_memory(&archive, data, size, &options)) {
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
            float step;
            wv_find(archive, tensor->name);
            if (tensor->elements > MOST / 16)
                continue;
            void *room = malloc(16 * (size_t)tensor->elements + 1);
            wv_load(archive, tensor, WV_STORED, room, wv_bytes(tensor, WV_STORED));
            if (tensor->elements)
                wv_levels(archive, tensor, room, 4 * (size_t)tensor->elements, &step);
            free(room);
        }
        wv_load_all(archive, &sink);
        wv_close(archive);
    }
    if (!wv_open_stream(&archive, &sink, &options)) {
        for (size_t at = 0; at < size; at += 1000)
            wv_push(archive, data + at, size - at < 1000 ? size - at : 1000);
        wv_finish(archive);
        wv_close(archive);
    }
    return 0;
}
