"""The displayed formulas of the notes "RL studies", numbered in the order in which they are printed.

A ledger entry names the ones that it settles, and the ledger's summary counts them: none is left out, none counted
twice. Number 9 is an equation number, (5), with nothing in front of it.
"""

from __future__ import annotations

SECTIONS = {"2": range(1, 5), "2.1": range(5, 19), "2.2": range(19, 36), "2.2.1": range(36, 44),
            "2.2.3": range(44, 53), "2.2.4": range(53, 71), "2.2.5": range(71, 73), "2.3": range(73, 78),
            "2.4": range(78, 84), "2.5": range(84, 89), "2.6": range(89, 94), "2.7": range(94, 98)}

FORMULAS = dict(enumerate((
    # 2: entropy in RL
    "𝓗 = −E[log π(t|p)]", "θ → θ + η ∂J", "J = E[A(t)]", "δ𝓗 ≈ Σ ∂𝓗 δθ",
    # 2.1: linear order
    "(1) δ𝓗 ≈ Σ ∂𝓗 δθ", "(2) = −Σ δθ ∂ Σ π log π", "(3) = −Σ δθ Σ ∂π log π", "(4) = −Σ δθ E[log π ∂log π]", "(5)",
    "∂J = E[∂log π A]", "δH = −η Σ E[log π ∂log π] E[∂log π A]", "δH₁ → η Σ E[g^𝓗] (1/G) Σ g^J(t_i)",
    "−E[g^𝓗] = E[S ∂S] = E[(S − E[S]) ∂S]", "δ𝓗₁ = −(η/G) Σ E[(S − S̄) K₁(t, t_i) A(t_i)]",
    "K₁(t, t′) = Σ ∂S(t) ∂S(t′)", "δlog π(t) = (η/B) Σ K(t, t_i) A(t_i)",
    "δ𝓗₁ → −(η/BG) Σ_p (1/L_max) Σ E[(S − S̄) K₁ A]", "E[δ𝓗₁] → Cov(S, A)",
    # 2.2: estimating the linear order
    "δĤ₁ = 1/(G(G−1) L_max) Σ_{i≠j} (S_i − S̄_loo) K A_j", "(6) δĤ₁ = η/(B(B−1)) Σ_{n≠m} 1/(L_max G(G−1)) …",
    "(7) … Σ_{h,g} (S_h − S̄_n) K A_g", "h₀(p_n, p_m) = G/(L_max (G−1)) E[(S − S̄_n) K A]", "T = E[δ𝓗₁] = E[h(p, p′)]",
    "U = 1/(B(B−1)) Σ h(p_n, p_m)", "φ₁(p) = E[h(p, p′)] − T", "φ₂(p, p′) = h − T − φ₁(p) − φ₁(p′)",
    "U − T = 1/(B(B−1)) Σ φ₁(p_n) + φ₁(p_m) + φ₂", "Σ φ₁(p_n) + φ₁(p_m) = 2(B−1) Σ φ₁(p_n)",
    "U − T = (2/B) Σ φ₁ + 1/(B(B−1)) Σ φ₂", "Cov(Σ φ₁, Σ φ₂) = Σ E[φ₁ φ₂]", "ζ₁ = Var(φ₁) = Var(E[h|p])",
    "Var((2/B) Σ φ₁) = (4/B) ζ₁", "Var(Σ φ₂) = 2 Σ Var(φ₂) = B(B−1) ζ₂", "Var(Σ φ₂/(B(B−1))) = 2/(B(B−1)) ζ₂",
    "Var(U) = (4/B) ζ₁ + 2/(B(B−1)) ζ₂",
    # 2.2.1: measuring ζ₁
    "X_n = (1/G) Σ (S_g − S̄_{−g}) ∂S_g", "Y_n = 1/(L_max G) Σ A_g ∂S_g",
    "U = B/(B−1) X̄·Ȳ − 1/(B(B−1)) Σ X_n·Y_n", "r_n = (X_n·Ȳ_{−n} + Y_n·X̄_{−n})/2", "φ_n = r_n − U",
    "ζ̂₁ = 1/(B−1) Σ φ_n²", "U_{(−n)} = (B U − 2 r_n)/(B − 2)", "Var_jackknife = (B−1)/B Σ (U_{(−n)} − Ū)²",
    # 2.2.3: two batches
    "δĤ = mean Ĥ_{θ+δθ}(p_n) − mean Ĥ_θ(p_n)", "X̄ = (1/B_E) Σ X_n, Ȳ = (1/B_U) Σ Y_p", "δĤ₁ = η X̄·Ȳ",
    "E[X̄] = μ_X, Cov(X̄) = Σ_X/B_E; E[Ȳ] = μ_Y, Cov(Ȳ) = Σ_Y/B_U",
    "Var(δĤ₁) = η² (μ_X Σ_Y μ_X/B_U + μ_Y Σ_X μ_Y/B_E + Tr[Σ_X Σ_Y]/(B_E B_U))",
    "Σ̂_X = 1/(B_E−1) Σ (X_n − X̄)(X_n − X̄)", "V̂_X = 1/(B_U (B_E−1)) Σ (Ȳ·(X_n − X̄))²",
    "V̂_Y = 1/(B_E (B_U−1)) Σ (X̄·(Y_n − Ȳ))²", "Var(δĤ₁) ≈ V̂_X + V̂_Y",
    # 2.2.4: variance reduction
    "Ĥ_RB = −(1/G) Σ_n Σ_k Σ_{t_k} π log π", "E[Σ_{t′_k} π log π(t′_k|t_<k)]",
    "Σ π(t_<k) π(t′_k|t_<k) log π(t′_k|t_<k)",
    "Σ_t π(t) log π(t_k|t_<k)", "Σ_t π(t) log π(t) = −E[H]", "E[H] = Σ π(t|p) D(p) log π(t|p) → (1/B) Σ π log π",
    "F_k = σ(p, t_<k)", "Z_k = −log π(t_k|t_<k, p)", "H_k = E[Z_k|F_k]", "S = Σ Z_k and S_RB = Σ H_k",
    "Var(S_RB) ≤ Var(S)", "E[S] = Σ E[Z_k] = Σ E[E[Z_k|F_k]] = E[S_RB]", "E[D_k|F_{k−1}] = 0",
    "E[D_i D_j] = E[D_i E[D_j|F_{j−1}]] = 0", "Var(S) = Var(S_RB) + Var(Σ D_k) + 2 Cov(S_RB, Σ D_k)",
    "E[(Σ_{k<j} H_k) D_j] = 0, E[(Σ_{k≥j} H_k) D_j] = 0", "Var(Σ D_k) = Σ E[D_k²] = Σ E[Var(Z_k|F_k)]",
    "Var(S) = Var(S_RB) + Σ E[Var(Z_k|F_k)]",
    # 2.2.5: computing the Rao–Blackwell entropy
    "H(p) = Z − Σ p z", "H(full) = s H(p_S/s) − s log s − ε log ε + tail error",
    # 2.3: the entropy variation again
    "𝓗 = Σ E[H_k]", "∂𝓗 = E[Σ ∂H_k] + E[(Σ H_k) ∂log π]", "E[(Σ H_k) ∂log π] = E[Σ (G_k − b_k) ∂log π(t_k)]",
    "(G_k − b_k) ∂log π(t_k|t_<k)", "b_k = H_k + μ_k^resid",
    # 2.4: putting things together
    "H(θ + ηv) − H(θ)", "H(θ + ηv) = E[w H]", "E[H]/E[T]", "H(θ + ηv) → Σ w_i/(Σ w_j T_j) Σ_k H_k",
    "H^per tok = (1/T_tot) Σ w_i H_i/(Σ w_j T_j)",
    "δH₁/η → (1/T_tot) Σ Σ_k (G_k − b_k) ∇_v S_k + ∇_v H_k − T_i H_k ∇_v S",
    # 2.5: validity of the linear order
    "δθ = −η P ∂L", "η ≪ η* = 2|∇H·Pg|/|Pg·∇²H·Pg|", "(∇²H)(Pg)", "δθ_t ≈ −η(α_t g_t + β_t m_t) = −η s_t",
    "2|∇H·s_t|/|s_t·∇²H·s_t|",
    # 2.6: second order
    "δ𝓗 = Σ ∂𝓗 δθ + ½ Σ ∂∂𝓗 δθ δθ + O(η²)", "∂H = E[Σ (G_k − b_k) ∂S_k + ∂H_k]",
    "∂∂H = E[Σ (G_k − b_k) ∂∂S_k] + …", "H = E[Σ H_k] → ∂H = E[Σ H_k ∂S + ∂H_k]",
    "v·∇²H·v = E[Σ v·∇²H_k·v + 2 ∇_v S ∇_v H_k + H_k ∇_v² S + H_k (∇_v S)²]",
    # 2.7: the kernel with AdamW
    "δθ = η (m/(√v + ε) − λθ)", "m = (1−β₁)/(1−β₁^t) Σ β₁^{t−t′} g^{t′}",
    "δH₁ = −η Σ 1/(√v + ε) (1−β₁)/(1−β₁^t) E[S ∂S] Σ β₁^{t−t′} g^{t′}", "K^nl = Σ 1/(√v + ε) ∂S_t ∂S_t′",
), start=1))


def section_of(number: int) -> str:
    """The section of the notes in which a displayed formula stands.

    >>> section_of(48)
    '2.2.3'
    """
    return next(section for section, numbers in SECTIONS.items() if number in numbers)
