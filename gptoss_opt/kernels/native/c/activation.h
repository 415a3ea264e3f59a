/* The clamped SwiGLU, and its gradient, in float32. */
#pragma once
#include "common.h"

typedef struct {
    const void *gate_up; /* [count, 2]: gate and up side by side */
    const void *d_out;   /* [count], for the gradient */
    void *to;            /* [count] forward, [count, 2] backward */
    long count;
    int half;            /* bfloat16, or float32 */
    float alpha, limit;
} Activation;

enum { ACTIVATED = 4096 };

/* exp by 2^n times a polynomial, to about 1e-7; written so that compilers make vectors of it. */
INLINE float exponential(float v) {
    v = v < -87.0f ? -87.0f : v > 87.0f ? 87.0f : v;
    const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE float sigmoid(float v) { return v < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-v)); }

/* (up + 1) * gate * sigmoid(alpha * gate), gate clamped from above and up from both sides. */
INLINE void activate(const Activation *a, long first, long last, int half) {
    const float alpha = a->alpha, limit = a->limit;
    for (long i = first; i < last; i++) {
        float gate = load(a->gate_up, 2 * i, half), up = load(a->gate_up, 2 * i + 1, half);
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        store(a->to, i, half, (up + 1) * gate * sigmoid(alpha * gate));
    }
}

/* Its gradient: none where a clamp holds. */
INLINE void activate_back(const Activation *a, long first, long last, int half) {
    const float alpha = a->alpha, limit = a->limit;
    for (long i = first; i < last; i++) {
        const float g = load(a->gate_up, 2 * i, half), u = load(a->gate_up, 2 * i + 1, half);
        const float d = load(a->d_out, i, half);
        const float gate = g > limit ? limit : g, up = u > limit ? limit : u < -limit ? -limit : u;
        const float s = sigmoid(alpha * gate);
        const float d_gate = d * (up + 1) * s * (1 + alpha * gate * (1 - s)), d_up = d * gate * s;
        store(a->to, 2 * i, half, g > limit ? 0 : d_gate);
        store(a->to, 2 * i + 1, half, u > limit || u < -limit ? 0 : d_up);
    }
}

INLINE void activation_unit(const Activation *a, long index) {
    const long first = index * ACTIVATED, last = first + ACTIVATED < a->count ? first + ACTIVATED : a->count;
    if (a->d_out)
        a->half ? activate_back(a, first, last, 1) : activate_back(a, first, last, 0);
    else
        a->half ? activate(a, first, last, 1) : activate(a, first, last, 0);
}
