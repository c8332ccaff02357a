package cryptohook

import (
	"context"
	"errors"
	"fmt"

	"maunium.net/go/mautrix/id"
)

// Whom we verify: by the configuration's pins, by [Hook.Verify], or on another device of our account. All of it ends in our
// user-signing key's signature on a master key. A signature cannot be taken back from the server; what is withdrawn is noted here.

// Errors of [Hook.Verify] and [Hook.WithdrawVerification].
var (
	// ErrUnknownIdentity: the user has no cross-signing identity that we know.
	ErrUnknownIdentity = errors.New("the user has no cross-signing identity that is known")
	// ErrOtherMasterKey: the user's master key is not the one that is to be verified.
	ErrOtherMasterKey = errors.New("the user has another master key")
	// ErrPinned: the configuration pins a master key of the user, which outranks every verification.
	ErrPinned = errors.New("the configuration pins a master key of the user")
	// ErrOwnUser: our own identity is verified by its keys.
	ErrOwnUser = errors.New("the user is the account itself")
)

// Verify signs the user's master key (unpadded base64) with our user-signing key: from now on the user is verified, and another
// master key is a verification violation. The key has to be today's: see [ErrOtherMasterKey].
func (h *Hook) Verify(ctx context.Context, userID id.UserID, masterKey id.Ed25519) error {
	if err := h.mayDecideOn(userID); err != nil {
		return err
	}
	identity, err := h.store.identity(ctx, userID)
	if err != nil {
		return err
	} else if identity == nil || identity.MasterKey == "" {
		return ErrUnknownIdentity
	} else if identity.MasterKey != masterKey {
		return fmt.Errorf("%w: %s", ErrOtherMasterKey, identity.MasterKey)
	}
	return h.sign(ctx, identity)
}

// WithdrawVerification makes the user unverified at once, and what looked like a violation of an earlier verification acceptable:
// our signature on today's master key no longer counts, until the user is verified again.
func (h *Hook) WithdrawVerification(ctx context.Context, userID id.UserID) error {
	if err := h.mayDecideOn(userID); err != nil {
		return err
	}
	err := h.learn(ctx, func(ctx context.Context) error {
		identity, err := h.store.identity(ctx, userID)
		if err != nil {
			return err
		} else if identity == nil {
			return ErrUnknownIdentity
		}
		return h.withdraw(ctx, identity, identity.MasterKey)
	})
	if err != nil {
		return fmt.Errorf("failed to withdraw the verification of %s: %w", userID, err)
	}
	h.changed(Change{Users: []id.UserID{userID}})
	return nil
}

func (h *Hook) mayDecideOn(userID id.UserID) error {
	if userID == h.client.UserID {
		return ErrOwnUser
	}
	if _, pinned := h.options.VerifiedUsers[userID]; pinned {
		return ErrPinned
	}
	return nil
}

// withdraw has our signature on that master key no longer count.
func (h *Hook) withdraw(ctx context.Context, identity *Identity, masterKey id.Ed25519) error {
	if err := h.store.withdraw(ctx, identity.UserID, masterKey); err != nil {
		return err
	}
	identity.WasVerified = false
	if identity.MasterKey == masterKey {
		identity.VerifiedBy = ""
	}
	return h.storeStanding(ctx, identity)
}

// storeStanding stores an identity whose standing with us has changed, and judges its user's proven sessions anew.
func (h *Hook) storeStanding(ctx context.Context, identity *Identity) error {
	now := h.clock()
	if err := h.store.putIdentity(ctx, identity, now); err != nil {
		return err
	}
	return h.store.rejudge(ctx, identity, h.anchor(), now)
}

// sign signs the master key of an identity that somebody vouches for.
func (h *Hook) sign(ctx context.Context, identity *Identity) error {
	if err := h.mach.SignUser(ctx, identity.UserID, identity.MasterKey); err != nil {
		return fmt.Errorf("failed to sign the master key of %s: %w", identity.UserID, err)
	}
	err := h.learn(ctx, func(ctx context.Context) error {
		now, err := h.store.identity(ctx, identity.UserID)
		if err != nil || now == nil || now.MasterKey != identity.MasterKey {
			return err
		}
		if err = h.store.restore(ctx, identity.UserID, identity.MasterKey); err != nil {
			return err
		}
		now.VerifiedBy, now.WasVerified = h.anchor().userSigningKey, true
		return h.storeStanding(ctx, now)
	})
	if err != nil {
		return fmt.Errorf("failed to store our signature: %w", err)
	}
	h.changed(Change{Users: []id.UserID{identity.UserID}})
	return nil
}

// signPinned signs the user's master key with our user-signing key if the configuration pins just that key.
func (h *Hook) signPinned(ctx context.Context, userID id.UserID) error {
	if _, pinned := h.options.VerifiedUsers[userID]; !pinned {
		return nil
	}
	identity, err := h.store.identity(ctx, userID)
	if err != nil || !h.anchor().needsSignature(identity) {
		return err
	}
	if err = h.sign(ctx, identity); err != nil {
		return err
	}
	h.log.Info().Stringer("user_id", userID).Stringer("master_key", identity.MasterKey).Msg("Signed a pinned master key")
	return nil
}

// prepare brings what is stored in line with what may have changed while no process was there: sessions that mautrix received before
// there was a hook, the configuration's pins, and our own keys. A pin that was taken out, or replaced, withdraws the verification that
// it stood for.
func (h *Hook) prepare(ctx context.Context) error {
	if err := h.migrate(ctx); err != nil {
		return err
	}
	var change Change
	err := h.learn(ctx, func(ctx context.Context) error {
		identities, err := h.store.verifiedIdentities(ctx)
		if err != nil {
			return err
		}
		known := make(map[id.UserID]struct{}, len(identities))
		for _, identity := range identities {
			known[identity.UserID] = struct{}{}
		}
		for userID := range h.options.VerifiedUsers {
			if _, listed := known[userID]; listed {
				continue
			}
			identity, err := h.store.identity(ctx, userID)
			if err != nil {
				return err
			} else if identity != nil {
				identities = append(identities, identity)
			}
		}
		for _, identity := range identities {
			if err = h.applyPin(ctx, identity); err != nil {
				return err
			}
			change.Users = append(change.Users, identity.UserID)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("failed to apply the pinned master keys: %w", err)
	}
	// The owner may have reviewed what it had told before this was durable.
	h.changed(change)
	return nil
}

func (h *Hook) applyPin(ctx context.Context, identity *Identity) error {
	pin, former := h.options.VerifiedUsers[identity.UserID], identity.PinnedKey
	identity.PinnedKey = pin
	if former != "" && former != pin {
		h.log.Info().Stringer("user_id", identity.UserID).Stringer("master_key", former).Msg("The pin of this master key was taken out: withdrawing its verification")
		return h.withdraw(ctx, identity, former)
	}
	return h.storeStanding(ctx, identity)
}
