/* Fuzz driver of the HEVC decoder, for libFuzzer; with WV_FUZZ_MAIN a program that runs files:

       clang -g -O1 -fsanitize=fuzzer,address,undefined fuzz_hevc.c hevc.c -o fuzz_hevc
       cc -g -O1 -fsanitize=address,undefined -DWV_FUZZ_MAIN fuzz_hevc.c hevc.c -o run_hevc

   An input is the size of a configuration record in a byte, the record, and a NAL unit, for frames
   of 192 x 192. All memory has just the size that the decoder may use. */
#include "hevc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = 192, STRIDE = SIDE + 1, PADDING = 0xA5 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void *copy(const uint8_t *data, size_t size) {
    void *const bytes = malloc(size ? size : 1);
    if (!bytes)
        abort();
    memcpy(bytes, data, size);
    return bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const size_t config_size = size ? data[0] : 0, memory_size = wv_hevc_memory(SIDE, SIDE);
    const size_t luma_size = STRIDE * (SIDE - 1) + SIDE;
    size_t packet_size;
    uint8_t *config, *packet, *luma;
    void *memory;
    wv_hevc *decoder;
    if (size < 1 + config_size)
        return 0;
    config = copy(data + 1, config_size);
    memory = malloc(memory_size);
    decoder = memory ? wv_hevc_open(config, config_size, SIDE, SIDE, memory, memory_size) : NULL;
    free(config);
    if (decoder) {
        packet_size = size - 1 - config_size + 4;
        packet = malloc(packet_size);
        luma = malloc(luma_size);
        if (!packet || !luma)
            abort();
        for (unsigned i = 0; i < 4; i++)
            packet[i] = (uint8_t)((packet_size - 4) >> (24 - 8 * i));
        memcpy(packet + 4, data + 1 + config_size, packet_size - 4);
        memset(luma, PADDING, luma_size);
        (void)wv_hevc_decode(decoder, packet, packet_size, luma, STRIDE);
        for (unsigned row = 0; row + 1 < SIDE; row++)
            if (luma[row * STRIDE + SIDE] != PADDING)
                abort();
        free(luma);
        free(packet);
    }
    free(memory);
    return 0;
}

#ifdef WV_FUZZ_MAIN
int main(int count, char **names) {
    static uint8_t data[1 << 17];
    for (int i = 1; i < count; i++) {
        FILE *const file = fopen(names[i], "rb");
        if (!file)
            return 2;
        (void)LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof data, file));
        (void)fclose(file);
    }
    return 0;
}
#endif
