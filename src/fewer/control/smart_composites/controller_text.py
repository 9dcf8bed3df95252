"""The C of the controller, with @words where sizes, types and names go. It follows `controller.py` step by step."""

HEADER = """#ifndef @BIG_MPC_H
#define @BIG_MPC_H

#include "@name.h"

#define @BIG_MPC_M @m   /* inputs of the plant */
#define @BIG_MPC_P @p   /* outputs of the plant */
#define @BIG_MPC_N2 @n2 /* samples looked ahead */
#define @BIG_MPC_SIZE @size
#define @BIG_MPC_NZ @nz

#ifdef __cplusplus
extern "C" {
#endif

/* All memory of the controller; the caller owns it. */
typedef struct {
    @real past_u[@keep * @m], past_y[@outs * @p], U[@size]; /* newest first */
    @real slopes[@n2 * @p * @size], curves[@curve_size], y[@n2 * @p];
    @real gradient[@size], hessian[@size * @size], factor[@size * @size], step[@size], trial[@size];
    @real z[@nz], dz[@nz * @size], jacobian[@p * @nz], second[@p * @nz * @nz], product[@nz * @size];
    @name_state model;
    int started;
    int held; /* samples on which y was not finite and the last input was held */
    int iterations; /* Newton-Raphson steps of the last sample */
} @name_mpc_state;

void @name_mpc_reset(@name_mpc_state *s);
/* y[P] was measured now, reference[N2 * P] is wanted at the next samples; u[M] is to be applied now. */
void @name_mpc_step(@name_mpc_state *s, const @real y[], const @real reference[], @real u[]);

#ifdef __cplusplus
}
#endif

#endif
"""

SOURCE = """#include "@name_mpc.h"

#include <math.h>

#define M @m
#define P @p
#define N1 @n1
#define N2 @n2
#define NU @nu
#define ND @nd
#define DD @dd
#define SIZE @size
#define NZ @nz
#define NI ((ND + 1) * M)
#define CURVED @curved
#define BOXED @boxed

@arrays
/* Where the input at delay k of predicted sample j comes from: below SIZE from U, from SIZE on from the past. */
static int place(int j, int k)
{
    const int at = j - k < NU - 1 ? j - k : NU - 1;
    return j >= k ? at * M : SIZE + (k - j - 1) * M;
}

static void model_input(@name_mpc_state *s, const @real *U, int j)
{
    for (int k = 0; k <= ND; k++) {
        const int at = place(j, k);
        for (int i = 0; i < M; i++) s->z[k * M + i] = at < SIZE ? U[at + i] : s->past_u[at - SIZE + i];
    }
    for (int k = 0; k <= DD; k++)
        for (int i = 0; i < P; i++) s->z[NI + k * P + i] = j > k ? s->y[(j - k - 1) * P + i] : s->past_y[(k - j) * P + i];
}

static @real error_cost(const @real *error)
{
    @real sum = @0;
    for (int a = 0; a < P; a++)
        for (int b = 0; b < P; b++) sum += error[a] * Q[a * P + b] * error[b];
    return sum;
}

static @real change_at(const @name_mpc_state *s, const @real *U, int j, int i)
{
    return U[j * M + i] - (j ? U[(j - 1) * M + i] : s->past_u[i]);
}

/* The changes of the input and the soft box. */
static @real input_cost(const @name_mpc_state *s, const @real *U)
{
    @real sum = @0;
    for (int j = 0; j < NU; j++)
        for (int a = 0; a < M; a++) {
            for (int b = 0; b < M; b++) sum += change_at(s, U, j, a) * LAMBDA[a * M + b] * change_at(s, U, j, b);
#if BOXED
            sum += SHARPNESS[a] / (U[j * M + a] - LOWER[a]) + SHARPNESS[a] / (UPPER[a] - U[j * M + a]) - @4 * SHARPNESS[a] / (UPPER[a] - LOWER[a]);
#endif
        }
    return sum;
}

static @real cost(@name_mpc_state *s, const @real *U, const @real *reference)
{
    @real sum = input_cost(s, U);
    for (int j = 0; j < N2; j++) {
        @real error[P];
        model_input(s, U, j);
        @name_predict(s->z, s->y + j * P, &s->model);
        for (int a = 0; a < P; a++) error[a] = reference[j * P + a] - s->y[j * P + a];
        if (j + 1 >= N1) sum += error_cost(error);
    }
    return sum;
}

/* dy/dU and d2y/dU2 of predicted sample j, from the model's derivatives and those of the samples fed back. */
static void accumulate(@name_mpc_state *s, int j)
{
    @real *slope = s->slopes + j * P * SIZE;
    for (int i = 0; i < NZ * SIZE; i++) s->dz[i] = @0;
    for (int k = 0; k <= ND; k++) {
        const int at = place(j, k);
        for (int i = 0; i < M && at < SIZE; i++) s->dz[(k * M + i) * SIZE + at + i] = @1;
    }
    for (int k = 0; k <= DD && k < j; k++)
        for (int i = 0; i < P * SIZE; i++) s->dz[(NI + k * P) * SIZE + i] = s->slopes[(j - k - 1) * P * SIZE + i];
    for (int a = 0; a < P; a++)
        for (int c = 0; c < SIZE; c++) slope[a * SIZE + c] = @0;
    for (int a = 0; a < P; a++)
        for (int i = 0; i < NZ; i++)
            for (int c = 0; c < SIZE; c++) slope[a * SIZE + c] += s->jacobian[a * NZ + i] * s->dz[i * SIZE + c];
#if CURVED
    for (int a = 0; a < P; a++) {
        @real *curve = s->curves + (j * P + a) * SIZE * SIZE;
        for (int i = 0; i < NZ * SIZE; i++) s->product[i] = @0;
        for (int i = 0; i < NZ; i++)
            for (int l = 0; l < NZ; l++)
                for (int c = 0; c < SIZE; c++) s->product[i * SIZE + c] += s->second[(a * NZ + i) * NZ + l] * s->dz[l * SIZE + c];
        for (int c = 0; c < SIZE * SIZE; c++) curve[c] = @0;
        for (int i = 0; i < NZ; i++)
            for (int c = 0; c < SIZE; c++)
                for (int d = 0; d < SIZE; d++) curve[c * SIZE + d] += s->dz[i * SIZE + c] * s->product[i * SIZE + d];
        for (int k = 0; k <= DD && k < j; k++)
            for (int b = 0; b < P; b++)
                for (int c = 0; c < SIZE * SIZE; c++)
                    curve[c] += s->jacobian[a * NZ + NI + k * P + b] * s->curves[((j - k - 1) * P + b) * SIZE * SIZE + c];
    }
#endif
}

static void add_errors(@name_mpc_state *s, const @real *error, int j)
{
    const @real *slope = s->slopes + j * P * SIZE;
    for (int a = 0; a < P; a++) {
        @real weighted = @0;
        for (int b = 0; b < P; b++) weighted += Q[a * P + b] * error[b];
        for (int c = 0; c < SIZE; c++) s->gradient[c] -= @2 * slope[a * SIZE + c] * weighted;
#if CURVED
        for (int c = 0; c < SIZE * SIZE; c++) s->hessian[c] -= @2 * weighted * s->curves[(j * P + a) * SIZE * SIZE + c];
#endif
        for (int b = 0; b < P; b++)
            for (int c = 0; c < SIZE; c++)
                for (int d = 0; d < SIZE; d++) s->hessian[c * SIZE + d] += @2 * slope[a * SIZE + c] * Q[a * P + b] * slope[b * SIZE + d];
    }
}

static void add_inputs(@name_mpc_state *s, const @real *U)
{
    for (int j = 0; j < NU; j++)
        for (int a = 0; a < M; a++) {
            const int c = j * M + a;
            for (int b = 0; b < M; b++) {
                const @real w = @2 * LAMBDA[a * M + b];
                s->gradient[c] += w * (change_at(s, U, j, b) - (j + 1 < NU ? change_at(s, U, j + 1, b) : @0));
                s->hessian[c * SIZE + j * M + b] += (j + 1 < NU ? @2 : @1) * w;
                if (j + 1 < NU) {
                    s->hessian[c * SIZE + (j + 1) * M + b] -= w;
                    s->hessian[((j + 1) * M + a) * SIZE + j * M + b] -= w;
                }
            }
#if BOXED
            {
                const @real below = U[c] - LOWER[a], above = UPPER[a] - U[c];
                s->gradient[c] += SHARPNESS[a] * (@1 / (above * above) - @1 / (below * below));
                s->hessian[c * SIZE + c] += @2 * SHARPNESS[a] * (@1 / (below * below * below) + @1 / (above * above * above));
            }
#endif
        }
}

static @real derivatives(@name_mpc_state *s, const @real *U, const @real *reference)
{
    @real sum = input_cost(s, U);
    for (int c = 0; c < SIZE; c++) s->gradient[c] = @0;
    for (int c = 0; c < SIZE * SIZE; c++) s->hessian[c] = @0;
    for (int j = 0; j < N2; j++) {
        @real error[P];
        model_input(s, U, j);
@evaluate
        accumulate(s, j);
        for (int a = 0; a < P; a++) error[a] = reference[j * P + a] - s->y[j * P + a];
        if (j + 1 >= N1) {
            sum += error_cost(error);
            add_errors(s, error, j);
        }
    }
    add_inputs(s, U);
    return sum;
}

/* factor factor^T = hessian + damping I, in place; 0 where that is not positive definite. */
static int cholesky(@name_mpc_state *s, @real damping)
{
    @real *f = s->factor;
    for (int c = 0; c < SIZE * SIZE; c++) f[c] = s->hessian[c];
    for (int c = 0; c < SIZE; c++) {
        @real pivot = f[c * SIZE + c] + damping;
        for (int k = 0; k < c; k++) pivot -= f[c * SIZE + k] * f[c * SIZE + k];
        if (!(pivot > @0)) return 0;
        f[c * SIZE + c] = @sqrt(pivot);
        for (int r = c + 1; r < SIZE; r++) {
            @real sum = f[r * SIZE + c];
            for (int k = 0; k < c; k++) sum -= f[r * SIZE + k] * f[c * SIZE + k];
            f[r * SIZE + c] = sum / f[c * SIZE + c];
        }
    }
    return 1;
}

/* step = -(hessian + mu I)^-1 gradient, mu the smallest of 0, 1e-6, 1e-5, ... that will do; 0 where none will. */
static int newton_step(@name_mpc_state *s)
{
    @real damping = @0, *x = s->step;
    const @real *f = s->factor;
    int tries = 0;
    while (!cholesky(s, damping)) {
        damping = damping > @0 ? damping * @10 : @first_damping;
        if (++tries > 40) return 0;
    }
    for (int r = 0; r < SIZE; r++) {
        x[r] = -s->gradient[r];
        for (int k = 0; k < r; k++) x[r] -= f[r * SIZE + k] * x[k];
        x[r] /= f[r * SIZE + r];
    }
    for (int r = SIZE - 1; r >= 0; r--) {
        for (int k = r + 1; k < SIZE; k++) x[r] -= f[k * SIZE + r] * x[k];
        x[r] /= f[r * SIZE + r];
    }
    return 1;
}

/* U + t step, t so short that U stays inside the box, and halved while the cost would rise. */
static void move(@name_mpc_state *s, @real value, const @real *reference)
{
    @real t = @1;
#if BOXED
    for (int c = 0; c < SIZE; c++) {
        const @real way = s->step[c], room = way < @0 ? LOWER[c % M] - s->U[c] : UPPER[c % M] - s->U[c];
        if (way < @0 || way > @0) {
            const @real longest = @to_the_bound * (room / way);
            if (longest < t) t = longest;
        }
    }
#endif
    for (int halving = 0; halving <= @halvings; halving++) {
        for (int c = 0; c < SIZE; c++) s->trial[c] = s->U[c] + t * s->step[c];
        if (halving == @halvings || cost(s, s->trial, reference) <= value + @slack * @abs(value)) break;
        t /= @2;
    }
    for (int c = 0; c < SIZE; c++) s->U[c] = s->trial[c];
}

static void remember(@real *past, const @real *now, int rows, int width)
{
    for (int i = rows * width - 1; i >= width; i--) past[i] = past[i - width];
    for (int i = 0; i < width; i++) past[i] = now[i];
}

void @name_mpc_reset(@name_mpc_state *s)
{
    for (int c = 0; c < SIZE; c++) s->U[c] = REST[c % M];
    for (int c = 0; c < @keep * M; c++) s->past_u[c] = REST[c % M];
    s->started = s->held = s->iterations = 0;
    @name_reset(&s->model);
}

void @name_mpc_step(@name_mpc_state *s, const @real y[], const @real reference[], @real u[])
{
    @real first = @0;
    for (int i = 0; i < P; i++)
        if (!(y[i] - y[i] == @0)) { /* NaN or infinity */
            s->held++;
            for (int k = 0; k < M; k++) u[k] = s->past_u[k];
            remember(s->past_u, u, @keep, M);
            return;
        }
    for (int k = s->started ? 1 : DD + 1; k > 0; k--) remember(s->past_y, y, DD + 1, P);
    s->started = 1;
    s->iterations = 0;
    for (int iteration = 0; iteration < @max_iter; iteration++) {
        const @real value = derivatives(s, s->U, reference);
        @real length = @0;
        for (int c = 0; c < SIZE; c++) length += s->gradient[c] * s->gradient[c];
        length = @sqrt(length);
        if (iteration == 0) first = length;
        if (length <= @tiny || (iteration && length <= @rtol * first) || !newton_step(s)) break;
        move(s, value, reference);
        s->iterations++;
    }
    for (int k = 0; k < M; k++) u[k] = s->U[k];
    remember(s->past_u, u, @keep, M);
    for (int c = 0; c < SIZE - M; c++) s->U[c] = s->U[c + M];
}
"""

CURVED = "        @name_hessian(s->z, s->y + j * P, s->jacobian, s->second);"
FLAT = "        @name_predict(s->z, s->y + j * P, &s->model);\n        @name_jacobian(s->z, s->jacobian);"
