/* FFmpeg's software decoders, by libavcodec (link with -lavcodec -lavutil). */
#include "decoders.h"

#include <libavcodec/avcodec.h>
#include <stdlib.h>
#include <string.h>

typedef struct state {
    AVCodecContext *context;
    AVPacket *packet;
    AVFrame *frame;
    int width, height;
} state;

static void lav_close(void *user)
{
    state *const s = *(void **)user;
    avcodec_free_context(&s->context);
    av_packet_free(&s->packet);
    av_frame_free(&s->frame);
    free(s);
    *(void **)user = NULL;
}

static wv_status lav_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                          uint32_t width, uint32_t height)
{
    const enum AVCodecID id = !memcmp(entry, "hvc1", 4) ? AV_CODEC_ID_HEVC
                            : !memcmp(entry, "av01", 4) ? AV_CODEC_ID_AV1 : AV_CODEC_ID_H264;
    /* FFmpeg's own AV1 decoder needs hardware: dav1d does not. */
    const AVCodec *const codec = id == AV_CODEC_ID_AV1 ? avcodec_find_decoder_by_name("libdav1d")
                                                       : avcodec_find_decoder(id);
    state *const s = calloc(1, sizeof *s);
    if (!s)
        return WV_MEMORY;
    *(void **)user = s;
    s->width = (int)width;
    s->height = (int)height;
    s->packet = av_packet_alloc();
    s->frame = av_frame_alloc();
    s->context = codec ? avcodec_alloc_context3(codec) : NULL;
    if (s->packet && s->frame && s->context) {
        s->context->max_pixels = (int64_t)width * height;
        s->context->thread_count = 1; /* a picture comes out when its packet goes in */
        s->context->extradata = av_mallocz(bytes + AV_INPUT_BUFFER_PADDING_SIZE);
        if (s->context->extradata) {
            memcpy(s->context->extradata, config, bytes);
            s->context->extradata_size = (int)bytes;
            if (!avcodec_open2(s->context, codec, NULL))
                return WV_OK;
        }
    }
    lav_close(user);
    return WV_CODEC;
}

static wv_status lav_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                            size_t *stride)
{
    state *const s = *(void **)user;
    int failed = av_new_packet(s->packet, (int)bytes); /* with the padding that FFmpeg wants */
    if (failed)
        return WV_MEMORY;
    memcpy(s->packet->data, packet, bytes);
    /* The end of the stream has the decoder give the picture at once; it starts anew behind it. */
    failed = avcodec_send_packet(s->context, s->packet) || avcodec_send_packet(s->context, NULL)
             || avcodec_receive_frame(s->context, s->frame);
    av_packet_unref(s->packet);
    avcodec_flush_buffers(s->context);
    const int format = s->frame->format;
    if (failed || (format != AV_PIX_FMT_YUV420P && format != AV_PIX_FMT_YUVJ420P)
        || s->frame->width != s->width || s->frame->height != s->height || s->frame->linesize[0] <= 0)
        return WV_CODEC;
    *luma = s->frame->data[0];
    *stride = (size_t)s->frame->linesize[0];
    return WV_OK;
}

wv_decoder wv_libavcodec(void **slot)
{
    const wv_decoder made = {slot, lav_open, lav_decode, lav_close};
    return made;
}
