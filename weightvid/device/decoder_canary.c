/* The canary of decoders.h: a device decodes as long as it is exact. */
#include "decoders.h"

#include <stdlib.h>
#include <string.h>

static void canary_close(void *user)
{
    wv_canary *const c = user;
    if (c->device_open)
        c->device.close(c->device.user);
    free(c->memory);
    free(c->luma);
    memset(c, 0, sizeof *c);
}

static wv_status canary_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                             uint32_t width, uint32_t height)
{
    wv_canary *const c = user;
    const size_t memory = memcmp(entry, "hvc1", 4) ? 0 : wv_hevc_memory(width, height);
    c->width = width;
    c->height = height;
    if (memory) {
        c->memory = malloc(memory);
        c->luma = malloc((size_t)width * height);
        if (c->memory && c->luma)
            c->software = wv_hevc_open(config, bytes, width, height, c->memory, memory);
    }
    c->device_open = !c->device.open(c->device.user, entry, config, bytes, width, height);
    if (c->device_open || c->software)
        return WV_OK;
    canary_close(c);
    return WV_CODEC;
}

static wv_status canary_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                               size_t *stride)
{
    wv_canary *const c = user;
    if (c->device_open) {
        int good = !c->device.decode(c->device.user, packet, bytes, luma, stride);
        if (!c->software)
            return good ? WV_OK : WV_CODEC;
        if (good && !c->checked) {
            if (wv_hevc_decode(c->software, packet, bytes, c->luma, c->width))
                return WV_CODEC;
            for (uint32_t y = 0; y < c->height; y++)
                good &= !memcmp(*luma + y * *stride, c->luma + (size_t)y * c->width, c->width);
            c->checked = good;
        }
        if (good)
            return WV_OK;
        c->device.close(c->device.user);
        c->device_open = 0;
    }
    *luma = c->luma;
    *stride = c->width;
    return wv_hevc_decode(c->software, packet, bytes, c->luma, c->width) ? WV_CODEC : WV_OK;
}

wv_decoder wv_guard(wv_canary *canary, const wv_decoder *device)
{
    const wv_decoder made = {canary, canary_open, canary_decode, canary_close};
    memset(canary, 0, sizeof *canary);
    canary->device = *device;
    return made;
}
