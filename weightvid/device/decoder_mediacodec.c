/* Android's decoder, by AMediaCodec of the NDK (link with -lmediandk).

   Written from the platform's documentation; not run here. A decoder that wants another sample range,
   or that gives no bytes, is found by the canary of decoders.h. */
#include "decoders.h"

#include <media/NdkMediaCodec.h>
#include <media/NdkMediaFormat.h>
#include <stdlib.h>
#include <string.h>

enum { YUV_420_FLEXIBLE = 0x7F420888, RANGE_FULL = 1, WAIT_US = 20000, WAITS = 100 };

typedef struct state {
    AMediaCodec *codec;
    uint32_t width, height;
    int hevc;
    uint8_t *luma, *sets; /* a picture; parameter sets behind start codes */
    size_t sets_bytes;
} state;

static void media_close(void *user)
{
    state *const s = *(void **)user;
    if (s->codec) {
        AMediaCodec_stop(s->codec);
        AMediaCodec_delete(s->codec);
    }
    free(s->luma);
    free(s->sets);
    free(s);
    *(void **)user = NULL;
}

/* Parameter sets of an hvcC box, behind start codes in the place of their 2-byte lengths. */
static void copy_sets(state *s, const uint8_t *config, size_t bytes)
{
    static const uint8_t start_code[4] = {0, 0, 0, 1};
    size_t at = 23;
    for (unsigned lists = bytes < at ? 0 : config[22]; lists && bytes - at >= 3; lists--) {
        unsigned units = (unsigned)config[at + 1] << 8 | config[at + 2];
        for (at += 3; units && bytes - at >= 2; units--) {
            const size_t size = (size_t)config[at] << 8 | config[at + 1];
            at += 2;
            if (size > bytes - at)
                return;
            memcpy(s->sets + s->sets_bytes, start_code, 4);
            memcpy(s->sets + s->sets_bytes + 4, config + at, size);
            s->sets_bytes += 4 + size;
            at += size;
        }
    }
}

static wv_status media_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                            uint32_t width, uint32_t height)
{
    const int hevc = !memcmp(entry, "hvc1", 4);
    if (!hevc && memcmp(entry, "av01", 4))
        return WV_CODEC;
    state *const s = calloc(1, sizeof *s);
    if (!s)
        return WV_MEMORY;
    *(void **)user = s;
    s->width = width;
    s->height = height;
    s->hevc = hevc;
    s->luma = malloc((size_t)width * height);
    s->sets = malloc(3 * bytes + 1); /* an empty unit grows from 2 to 4 bytes */
    const char *const mime = hevc ? "video/hevc" : "video/av01";
    AMediaFormat *const format = AMediaFormat_new();
    s->codec = AMediaCodec_createDecoderByType(mime);
    int failed = !s->luma || !s->sets || !format || !s->codec;
    if (!failed) {
        if (hevc)
            copy_sets(s, config, bytes);
        AMediaFormat_setString(format, AMEDIAFORMAT_KEY_MIME, mime);
        AMediaFormat_setInt32(format, AMEDIAFORMAT_KEY_WIDTH, (int32_t)width);
        AMediaFormat_setInt32(format, AMEDIAFORMAT_KEY_HEIGHT, (int32_t)height);
        AMediaFormat_setInt32(format, AMEDIAFORMAT_KEY_COLOR_FORMAT, YUV_420_FLEXIBLE);
        AMediaFormat_setInt32(format, "color-range", RANGE_FULL);
        /* Lossless pictures are larger than decoders expect: their buffers must hold one. */
        AMediaFormat_setInt32(format, AMEDIAFORMAT_KEY_MAX_INPUT_SIZE,
                              (int32_t)(s->sets_bytes + (size_t)width * height * 3 / 2));
        AMediaFormat_setBuffer(format, "csd-0", hevc ? s->sets : config,
                               hevc ? s->sets_bytes : bytes);
        failed = AMediaCodec_configure(s->codec, format, NULL, NULL, 0) != AMEDIA_OK
                 || AMediaCodec_start(s->codec) != AMEDIA_OK;
    }
    if (format)
        AMediaFormat_delete(format);
    if (failed)
        media_close(user);
    return failed ? WV_CODEC : WV_OK;
}

/* A packet as an access unit of its own: parameter sets, then units behind start codes. */
static int give_packet(state *s, const uint8_t *packet, size_t bytes)
{
    size_t room;
    const ssize_t place = AMediaCodec_dequeueInputBuffer(s->codec, (int64_t)WAITS * WAIT_US);
    uint8_t *const input = place < 0 ? NULL : AMediaCodec_getInputBuffer(s->codec, (size_t)place, &room);
    if (!input || room < s->sets_bytes || room - s->sets_bytes < bytes)
        return -1;
    memcpy(input, s->sets, s->sets_bytes);
    memcpy(input + s->sets_bytes, packet, bytes);
    for (size_t at = 0; s->hevc && bytes - at >= 4;) {
        uint8_t *const head = input + s->sets_bytes + at;
        const size_t unit = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
        memcpy(head, "\0\0\0\1", 4);
        at += 4;
        if (unit > bytes - at)
            return -1;
        at += unit;
    }
    /* The end of the stream has the decoder give the picture at once. */
    return AMediaCodec_queueInputBuffer(s->codec, (size_t)place, 0, s->sets_bytes + bytes, 0,
                                        AMEDIACODEC_BUFFER_FLAG_END_OF_STREAM) != AMEDIA_OK;
}

/* Copies the luma out of an output buffer: rows lie `stride` apart, from the crop's corner on. */
static int copy_luma(state *s, size_t place, const AMediaCodecBufferInfo *info)
{
    int32_t stride = (int32_t)s->width, left = 0, top = 0;
    size_t room;
    const uint8_t *const output = AMediaCodec_getOutputBuffer(s->codec, place, &room);
    AMediaFormat *const format = AMediaCodec_getOutputFormat(s->codec);
    if (format) {
        AMediaFormat_getInt32(format, AMEDIAFORMAT_KEY_STRIDE, &stride);
        AMediaFormat_getInt32(format, "crop-left", &left);
        AMediaFormat_getInt32(format, "crop-top", &top);
        AMediaFormat_delete(format);
    }
    if (!output || left < 0 || top < 0 || stride < 0 || (uint32_t)stride < s->width)
        return -1;
    size_t at = (size_t)info->offset + (size_t)top * (size_t)stride + (size_t)left;
    for (uint32_t y = 0; y < s->height; y++, at += (size_t)stride) {
        if (at > room || room - at < s->width)
            return -1;
        memcpy(s->luma + (size_t)y * s->width, output + at, s->width);
    }
    return 0;
}

static wv_status media_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                              size_t *stride)
{
    state *const s = *(void **)user;
    int found = 0;
    if (give_packet(s, packet, bytes))
        return WV_CODEC;
    for (int tries = 0; tries < WAITS && !found; tries++) {
        AMediaCodecBufferInfo info;
        const ssize_t place = AMediaCodec_dequeueOutputBuffer(s->codec, &info, WAIT_US);
        if (place < 0 && place != AMEDIACODEC_INFO_TRY_AGAIN_LATER
            && place != AMEDIACODEC_INFO_OUTPUT_FORMAT_CHANGED
            && place != AMEDIACODEC_INFO_OUTPUT_BUFFERS_CHANGED)
            break;
        if (place < 0)
            continue;
        found = info.size <= 0 ? -1 : copy_luma(s, (size_t)place, &info) ? -1 : 1;
        AMediaCodec_releaseOutputBuffer(s->codec, (size_t)place, 0);
    }
    *luma = s->luma;
    *stride = s->width;
    return AMediaCodec_flush(s->codec) == AMEDIA_OK && found == 1 ? WV_OK : WV_CODEC;
}

wv_decoder wv_mediacodec(void **slot)
{
    const wv_decoder made = {slot, media_open, media_decode, media_close};
    return made;
}
