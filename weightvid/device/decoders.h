/* Decoders of platforms and libraries for weightvid.h, and the canary before them.

       void *state = NULL;
       wv_canary canary;
       const wv_decoder device = wv_libavcodec(&state), decoder = wv_guard(&canary, &device);
       const wv_options options = {{NULL, NULL, NULL}, &decoder, WV_CHECK_FRAMES};

   Keep canary, state and decoder as long as the archive. */
#ifndef WEIGHTVID_DECODERS_H
#define WEIGHTVID_DECODERS_H

#include "hevc.h"
#include "weightvid.h"

typedef struct wv_canary {
    wv_decoder device;
    int device_open; /* it decodes; 0: the built-in decoder does */
    int checked;     /* its first picture was exact */
    uint32_t width, height;
    wv_hevc *software;
    void *memory;
    uint8_t *luma;
} wv_canary;

/* A decoder that compares the device's first picture with the built-in decoder's: the latter takes
   over if they differ, and where the device fails, then or later. Pictures that a device changes
   later have another SHA-256: WV_DIGEST; open the archive without the device then. Where the built-in
   decoder refuses the track (AV1, H.264, other HEVC) there is no canary: the SHA-256 alone decides. */
wv_decoder wv_guard(wv_canary *canary, const wv_decoder *device);

/* Each keeps what it needs behind `state`, from open to close. */
wv_decoder wv_libavcodec(void **state);    /* FFmpeg: HEVC, AV1, H.264 */
wv_decoder wv_libde265(void **state);      /* HEVC */
wv_decoder wv_mediacodec(void **state);    /* Android, API level 21: HEVC, AV1 */
wv_decoder wv_videotoolbox(void **state);  /* Apple: HEVC */

#endif
