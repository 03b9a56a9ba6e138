/* Lists the tensors of an archive, and shows the first values of one.

       cc -O2 -ffp-contract=off example.c weightvid.c hevc.c -o example
       ./example MODEL.mp4 [TENSOR]

   With a decoder of decoders.h, as of FFmpeg, add: -DDECODER=wv_libavcodec decoder_canary.c
   decoder_libavcodec.c -lavcodec -lavutil */
#include "weightvid.h"

#include <stdio.h>
#include <stdlib.h>

#ifdef DECODER
#include "decoders.h"
#endif

static int read_file(void *user, uint64_t offset, void *out, size_t bytes)
{
    return fseek(user, (long)offset, SEEK_SET) || fread(out, 1, bytes, user) != bytes;
}

int main(int count, char **words)
{
    FILE *const file = count > 1 ? fopen(words[1], "rb") : NULL;
    if (!file || fseek(file, 0, SEEK_END)) {
        if (count > 1)
            perror(words[1]);
        else
            fprintf(stderr, "usage: example MODEL.mp4 [TENSOR]\n");
        return 2;
    }
    const wv_reader reader = {file, (uint64_t)ftell(file), read_file};
    wv_options options = {{NULL, NULL, NULL}, NULL, WV_CHECK_FRAMES};
#ifdef DECODER
    void *state = NULL;
    wv_canary canary;
    const wv_decoder device = DECODER(&state), guarded = wv_guard(&canary, &device);
    options.decoder = &guarded;
#endif
    wv_archive *archive;
    wv_status status = wv_open_reader(&archive, &reader, &options);
    const wv_tensor *shown = count > 2 ? wv_find(archive, words[2]) : NULL;
    for (uint32_t i = 0; i < wv_count(archive); i++) {
        const wv_tensor *const tensor = wv_get(archive, i);
        printf("%s (", tensor->name);
        for (uint32_t axis = 0; axis < tensor->axes; axis++)
            printf("%s%llu", axis ? ", " : "", (unsigned long long)tensor->shape[axis]);
        printf(")\n");
        if (count < 3 && !shown && wv_bytes(tensor, WV_F32))
            shown = tensor;
    }
    if (!status && !shown)
        status = WV_NOT_FOUND;
    if (!status) {
        const size_t bytes = wv_bytes(shown, WV_F32);
        float *const values = malloc(bytes + 1);
        /* Integers cannot come as float32: wv_bytes is 0 then, and wv_load says so. */
        status = values ? wv_load(archive, shown, WV_F32, values, bytes) : WV_MEMORY;
        for (size_t i = 0; !status && i < bytes / 4 && i < 4; i++)
            printf("%s[%u] = %.9g\n", shown->name, (unsigned)i, (double)values[i]);
        free(values);
    }
#ifdef DECODER
    if (!status)
        printf("decoded by %s\n", canary.device_open ? "the device" : "the built-in decoder");
#endif
    wv_close(archive);
    fclose(file);
    if (status)
        fprintf(stderr, "%s: %s\n", words[1], wv_status_text(status));
    return status != WV_OK;
}
