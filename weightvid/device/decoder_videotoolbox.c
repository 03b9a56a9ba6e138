/* Apple's decoder, by VideoToolbox (-framework VideoToolbox -framework CoreMedia
   -framework CoreVideo -framework CoreFoundation).

   Written from the platform's documentation; not run here. Pictures are asked for in 420f, the full
   range, so that samples stay what they are; the canary of decoders.h finds out if they do not. */
#include "decoders.h"

#include <VideoToolbox/VideoToolbox.h>
#include <stdlib.h>
#include <string.h>

typedef struct state {
    CMVideoFormatDescriptionRef format;
    VTDecompressionSessionRef session;
    uint32_t width, height;
    int found; /* the picture has come */
    uint8_t *luma;
} state;

static void tool_close(void *user)
{
    state *const s = *(void **)user;
    if (s->session) {
        VTDecompressionSessionInvalidate(s->session);
        CFRelease(s->session);
    }
    if (s->format)
        CFRelease(s->format);
    free(s->luma);
    free(s);
    *(void **)user = NULL;
}

static void take_picture(void *user, void *unused, OSStatus status, VTDecodeInfoFlags flags,
                         CVImageBufferRef image, CMTime time, CMTime duration)
{
    state *const s = user;
    (void)unused;
    (void)flags;
    (void)time;
    (void)duration;
    if (status || !image || CVPixelBufferLockBaseAddress(image, kCVPixelBufferLock_ReadOnly))
        return;
    const uint8_t *const rows = CVPixelBufferGetBaseAddressOfPlane(image, 0);
    const size_t stride = CVPixelBufferGetBytesPerRowOfPlane(image, 0);
    if (rows && CVPixelBufferGetWidthOfPlane(image, 0) >= s->width
        && CVPixelBufferGetHeightOfPlane(image, 0) >= s->height) {
        for (uint32_t y = 0; y < s->height; y++)
            memcpy(s->luma + (size_t)y * s->width, rows + y * stride, s->width);
        s->found = 1;
    }
    CVPixelBufferUnlockBaseAddress(image, kCVPixelBufferLock_ReadOnly);
}

/* A dictionary of one entry, which takes over the value. */
static CFDictionaryRef one_entry(CFStringRef key, CFTypeRef value)
{
    const void *keys[1] = {key}, *values[1] = {value};
    CFDictionaryRef made = NULL;
    if (value) {
        made = CFDictionaryCreate(NULL, keys, values, 1, &kCFTypeDictionaryKeyCallBacks,
                                  &kCFTypeDictionaryValueCallBacks);
        CFRelease(value);
    }
    return made;
}

static wv_status tool_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                           uint32_t width, uint32_t height)
{
    if (memcmp(entry, "hvc1", 4))
        return WV_CODEC;
    state *const s = calloc(1, sizeof *s);
    if (!s)
        return WV_MEMORY;
    *(void **)user = s;
    s->width = width;
    s->height = height;
    s->luma = malloc((size_t)width * height);
    const int32_t full = kCVPixelFormatType_420YpCbCr8BiPlanarFullRange;
    CFDictionaryRef atoms = one_entry(CFSTR("hvcC"), CFDataCreate(NULL, config, (CFIndex)bytes));
    CFDictionaryRef extensions =
        one_entry(kCMFormatDescriptionExtension_SampleDescriptionExtensionAtoms, atoms);
    CFDictionaryRef wanted = one_entry(kCVPixelBufferPixelFormatTypeKey,
                                       CFNumberCreate(NULL, kCFNumberSInt32Type, &full));
    const VTDecompressionOutputCallbackRecord callback = {take_picture, s};
    const int failed = !s->luma || !extensions || !wanted
        || CMVideoFormatDescriptionCreate(NULL, kCMVideoCodecType_HEVC, (int32_t)width,
                                          (int32_t)height, extensions, &s->format)
        || VTDecompressionSessionCreate(NULL, s->format, NULL, wanted, &callback, &s->session);
    if (extensions)
        CFRelease(extensions);
    if (wanted)
        CFRelease(wanted);
    if (failed)
        tool_close(user);
    return failed ? WV_CODEC : WV_OK;
}

static wv_status tool_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                             size_t *stride)
{
    state *const s = *(void **)user;
    CMBlockBufferRef block = NULL;
    CMSampleBufferRef sample = NULL;
    s->found = 0;
    /* The packet is read in place: the session is done with it when the call below returns. */
    OSStatus status = CMBlockBufferCreateWithMemoryBlock(NULL, (void *)(uintptr_t)packet, bytes,
                                                         kCFAllocatorNull, NULL, 0, bytes, 0, &block);
    if (!status)
        status = CMSampleBufferCreateReady(NULL, block, s->format, 1, 0, NULL, 1, &bytes, &sample);
    if (!status)
        status = VTDecompressionSessionDecodeFrame(s->session, sample, 0, NULL, NULL);
    if (!status)
        status = VTDecompressionSessionWaitForAsynchronousFrames(s->session);
    if (sample)
        CFRelease(sample);
    if (block)
        CFRelease(block);
    *luma = s->luma;
    *stride = s->width;
    return status || !s->found ? WV_CODEC : WV_OK;
}

wv_decoder wv_videotoolbox(void **slot)
{
    const wv_decoder made = {slot, tool_open, tool_decode, tool_close};
    return made;
}
