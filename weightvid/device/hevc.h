/* Decoder of weightvid's HEVC tracks: the luma of one lossless I slice a picture.
   FORMAT.md, section 8 ("Device profile"), says which streams these are; others are refused. */
#ifndef WEIGHTVID_HEVC_H
#define WEIGHTVID_HEVC_H

#include <stddef.h>
#include <stdint.h>

typedef struct wv_hevc wv_hevc;

/* Bytes of work memory that a decoder for frames of this size needs; 0: no frame has this size. */
size_t wv_hevc_memory(uint32_t width, uint32_t height);

/* Makes a decoder in the caller's memory, which is aligned as malloc's and outlives it; there is
   nothing to close. `config` is the payload of the track's hvcC box; it may go after this call.
   NULL: the configuration is damaged, or outside the profile, or the memory too small. */
wv_hevc *wv_hevc_open(const uint8_t *config, size_t config_size, uint32_t width, uint32_t height,
                      void *memory, size_t memory_size);

/* Decodes one sample of the track (a NAL unit after its length of 4 bytes) into `height` rows of
   `width` luma samples, `stride` >= width bytes apart. Packets do not depend on each other.
   0: done. Negative: the packet is damaged or outside the profile, and the rows hold anything. */
int wv_hevc_decode(wv_hevc *decoder, const uint8_t *packet, size_t size, uint8_t *luma,
                   size_t stride);

#endif
