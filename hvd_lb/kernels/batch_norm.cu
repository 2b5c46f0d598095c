// Batch norm of the virtual workers of a group, each over its own images, by as few kernels as for one of them.
//
// x has, worker by worker, `rows` values of each channel: one for each image and position. With LAST channels are last in
// memory, value r of channel c at r·channels + c; else an image has planes of `positions` values, and it is at
// (r / positions · channels + c) · positions + r % positions. A thread takes VECTOR values that lie side by side: of as
// many channels with LAST, else of one. Results do not depend on the GPU: who adds what follows from the shape.
//
// Blocks of blockDim.x × blockDim.y threads, the former side by side in channels (1 without LAST); a grid of channels,
// splits (shares of the rows) and workers. Sums are made in WIDE; TYPE is that of x: 64, 32, 16 or BFLOAT16.
#define BFLOAT16 1

#if TYPE == 64
typedef double T;
typedef double WIDE;
__device__ inline WIDE widen(T value) { return value; }
__device__ inline T narrow(WIDE value) { return value; }
#elif TYPE == 32
typedef float T;
typedef float WIDE;
__device__ inline WIDE widen(T value) { return value; }
__device__ inline T narrow(WIDE value) { return value; }
#elif TYPE == BFLOAT16
typedef unsigned short T;
typedef float WIDE;
__device__ inline WIDE widen(T value) { return __uint_as_float((unsigned)value << 16); }
__device__ inline T narrow(WIDE value)
{
    const unsigned bits = __float_as_uint(value);
    if (value != value)
        return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest, ties to even
}
#else
typedef unsigned short T;
typedef float WIDE;
__device__ inline WIDE widen(T value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
__device__ inline T narrow(WIDE value)
{
    T half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

typedef const T *__restrict__ Input;
typedef T *__restrict__ Output;
typedef const WIDE *__restrict__ ByChannel; // and for each worker, but weight and bias

struct alignas(sizeof(T) * VECTOR) Values {
    T of[VECTOR];
};

// Count and mean of some values, and the sum of their squared distances from it (Welford; merged as by Chan et al.).
struct Moments {
    WIDE count, mean, squares;

    __device__ void add(const Moments &other)
    {
        if (other.count == 0)
            return;
        const WIDE all = count + other.count, apart = other.mean - mean, share = other.count / all;
        mean += apart * share;
        squares += other.squares + apart * apart * count * share;
        count = all;
    }
};

struct Sums {
    WIDE gradients, products;

    __device__ void add(const Sums &other)
    {
        gradients += other.gradients;
        products += other.products;
    }
};

// The first channel of this thread; there may be none of that number.
__device__ inline int own_channel() { return LAST ? (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR : blockIdx.x; }

// Calls visit(where) for all that this thread takes.
template <class Visit> __device__ inline void each(int rows, int channels, int positions, Visit visit)
{
    const int channel = own_channel(), parts = LAST ? rows : rows / VECTOR;
    if (channel >= channels)
        return;
    const long long worker = (long long)blockIdx.z * rows * channels;
#pragma unroll 2
    for (int part = blockIdx.y * blockDim.y + threadIdx.y; part < parts; part += gridDim.y * blockDim.y) {
        if (LAST) {
            visit(worker + (long long)part * channels + channel);
        } else {
            const int row = part * VECTOR, image = row / positions;
            visit(worker + ((long long)image * channels + channel) * positions + (row - image * positions));
        }
    }
}

// Adds up what the threads of a column have, each `width` sums; the first one's place has all of it.
template <class Sum> __device__ inline Sum *column(const Sum *mine, int width)
{
    __shared__ Sum shared[VECTOR * THREADS];
    Sum *own = shared + threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = 0; i < width; ++i)
        own[i * THREADS] = mine[i];
    for (int half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
            for (int i = 0; i < width; ++i)
                own[i * THREADS].add(own[i * THREADS + half * blockDim.x]);
    }
    return own;
}

// What the threads of a block have of each channel; `all` is by worker, split and channel.
template <class Sum> __device__ inline void keep(Sum *mine, Sum *all, int channels)
{
    const int channel = own_channel(), width = LAST ? VECTOR : 1;
    for (int i = width; i < VECTOR; ++i)
        mine[0].add(mine[i]);
    const Sum *sums = column(mine, width);
    if (threadIdx.y == 0 && channel < channels)
        for (int i = 0; i < width; ++i)
            all[(long long)(blockIdx.z * gridDim.y + blockIdx.y) * channels + channel + i] = sums[i * THREADS];
}

// The sum of all splits, for a worker and channel in each column of threads: the first thread has it.
template <class Sum> __device__ inline Sum kept(const Sum *__restrict__ all, int splits, int channels, int workers)
{
    const int me = blockIdx.x * blockDim.x + threadIdx.x;
    Sum sum = {};
    if (me < workers * channels) {
        all += (long long)(me / channels) * splits * channels + me % channels;
#pragma unroll 4
        for (int split = threadIdx.y; split < splits; split += blockDim.y)
            sum.add(all[(long long)split * channels]);
    }
    return *column(&sum, 1);
}

extern "C" __global__ void statistics(Input x, Moments *all, int rows, int channels, int positions)
{
    Moments mine[VECTOR] = {};
    int count = 0;
    each(rows, channels, positions, [&](long long where) {
        const Values values = *(const Values *)(x + where);
        const WIDE share = (WIDE)1 / ++count;
        for (int i = 0; i < VECTOR; ++i) {
            const WIDE value = widen(values.of[i]), apart = value - mine[i].mean;
            mine[i].mean += apart * share;
            mine[i].squares += apart * (value - mine[i].mean);
        }
    });
    for (int i = 0; i < VECTOR; ++i)
        mine[i].count = count;
    keep(mine, all, channels);
}

// Mean, 1/σ and the variance that is kept (of n − 1 values) of each worker and channel.
extern "C" __global__ void finish_statistics(const Moments *all, WIDE *mean, WIDE *inverse, WIDE *variance, int splits,
                                             int channels, int workers, double eps)
{
    const Moments sum = kept(all, splits, channels, workers);
    const int me = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.y || me >= workers * channels)
        return;
    mean[me] = sum.mean;
    inverse[me] = 1 / sqrt(sum.squares / sum.count + (WIDE)eps);
    variance[me] = sum.squares / (sum.count - 1);
}

extern "C" __global__ void normalize(Input x, ByChannel mean, ByChannel inverse, ByChannel weight,
                                     ByChannel bias, Output y, int rows, int channels, int positions)
{
    WIDE middle[VECTOR], factor[VECTOR], shift[VECTOR];
    for (int i = 0; i < VECTOR; ++i) {
        const int channel = own_channel() + (LAST ? i : 0);
        if (channel < channels) {
            middle[i] = mean[blockIdx.z * channels + channel];
            factor[i] = inverse[blockIdx.z * channels + channel] * weight[channel];
            shift[i] = bias[channel];
        }
    }
    each(rows, channels, positions, [&](long long where) {
        Values values = *(const Values *)(x + where);
        for (int i = 0; i < VECTOR; ++i)
            values.of[i] = narrow((widen(values.of[i]) - middle[i]) * factor[i] + shift[i]);
        *(Values *)(y + where) = values;
    });
}

// Of dy, and of dy · (x − mean).
extern "C" __global__ void gradients(Input x, Input dy, ByChannel mean, Sums *all, int rows, int channels,
                                     int positions)
{
    WIDE middle[VECTOR];
    for (int i = 0; i < VECTOR; ++i) {
        const int channel = own_channel() + (LAST ? i : 0);
        middle[i] = channel < channels ? mean[blockIdx.z * channels + channel] : 0;
    }
    Sums mine[VECTOR] = {};
    each(rows, channels, positions, [&](long long where) {
        const Values values = *(const Values *)(x + where), of_y = *(const Values *)(dy + where);
        for (int i = 0; i < VECTOR; ++i) {
            const WIDE gradient = widen(of_y.of[i]);
            mine[i].gradients += gradient;
            mine[i].products += gradient * (widen(values.of[i]) - middle[i]);
        }
    });
    keep(mine, all, channels);
}

// Each worker's share of the gradients of weight and bias.
extern "C" __global__ void finish_gradients(const Sums *all, ByChannel inverse, WIDE *of_weight, WIDE *of_bias,
                                            int splits, int channels, int workers)
{
    const Sums sum = kept(all, splits, channels, workers);
    const int me = blockIdx.x * blockDim.x + threadIdx.x;
    if (threadIdx.y || me >= workers * channels)
        return;
    of_weight[me] = sum.products * inverse[me];
    of_bias[me] = sum.gradients;
}

// dx = weight / σ · (dy − mean of dy − x̂ · mean of dy · x̂)
extern "C" __global__ void input_gradient(Input x, Input dy, ByChannel mean, ByChannel inverse,
                                          ByChannel weight, ByChannel of_weight, ByChannel of_bias, Output dx,
                                          int rows, int channels, int positions)
{
    WIDE middle[VECTOR], factor[VECTOR], along[VECTOR], level[VECTOR];
    for (int i = 0; i < VECTOR; ++i) {
        const int channel = own_channel() + (LAST ? i : 0), own = blockIdx.z * channels + channel;
        if (channel < channels) {
            middle[i] = mean[own];
            factor[i] = inverse[own] * weight[channel];
            along[i] = inverse[own] * of_weight[own] / rows;
            level[i] = of_bias[own] / rows;
        }
    }
    each(rows, channels, positions, [&](long long where) {
        const Values values = *(const Values *)(x + where);
        Values of_y = *(const Values *)(dy + where);
        for (int i = 0; i < VECTOR; ++i) {
            const WIDE straight = widen(of_y.of[i]) - level[i];
            of_y.of[i] = narrow((straight - (widen(values.of[i]) - middle[i]) * along[i]) * factor[i]);
        }
        *(Values *)(dx + where) = of_y;
    });
}
