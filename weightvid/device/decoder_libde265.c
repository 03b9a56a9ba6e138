/* HEVC by libde265 (link with -lde265). */
#include "decoders.h"

#include <libde265/de265.h>
#include <stdlib.h>
#include <string.h>

typedef struct state {
    de265_decoder_context *context;
    uint32_t width, height;
} state;

static void de_close(void *user)
{
    state *const s = *(void **)user;
    de265_free_decoder(s->context);
    free(s);
    *(void **)user = NULL;
}

static wv_status de_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                         uint32_t width, uint32_t height)
{
    size_t at = 23; /* of the first list of parameter sets in the configuration */
    de265_decoder_context *const context = memcmp(entry, "hvc1", 4) ? NULL : de265_new_decoder();
    if (!context)
        return WV_CODEC;
    state *const s = *(void **)user = malloc(sizeof *s);
    if (!s) {
        de265_free_decoder(context);
        return WV_MEMORY;
    }
    *s = (state){context, width, height};
    for (unsigned lists = bytes < at ? 0 : config[22]; lists && bytes - at >= 3; lists--) {
        unsigned units = (unsigned)config[at + 1] << 8 | config[at + 2];
        for (at += 3; units && bytes - at >= 2; units--) {
            const size_t size = (size_t)config[at] << 8 | config[at + 1];
            at += 2;
            if (size > bytes - at)
                break;
            de265_push_NAL(context, config + at, (int)size, 0, NULL);
            at += size;
        }
    }
    return WV_OK;
}

static wv_status de_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                           size_t *stride)
{
    const state *const s = *(void **)user;
    de265_decoder_context *const context = s->context;
    int more = 1, row;
    de265_release_next_picture(context); /* of the last call */
    if (bytes < 4 || de265_push_NAL(context, packet + 4, (int)(bytes - 4), 0, NULL)
        || de265_flush_data(context))
        return WV_CODEC;
    while (more) {
        const de265_error error = de265_decode(context, &more);
        if (error && error != DE265_ERROR_WAITING_FOR_INPUT_DATA)
            return WV_CODEC;
        if (error || de265_peek_next_picture(context))
            break;
    }
    const struct de265_image *const image = de265_peek_next_picture(context);
    if (!image || de265_get_bits_per_pixel(image, 0) != 8
        || (uint32_t)de265_get_image_width(image, 0) != s->width
        || (uint32_t)de265_get_image_height(image, 0) != s->height)
        return WV_CODEC;
    *luma = de265_get_image_plane(image, 0, &row);
    *stride = (size_t)row;
    return WV_OK;
}

wv_decoder wv_libde265(void **slot)
{
    const wv_decoder made = {slot, de_open, de_decode, de_close};
    return made;
}
