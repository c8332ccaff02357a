package cryptohook

import (
	"context"
	"runtime"
	"sync"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// The signatures on devices that mautrix stores for itself. It puts each one by a statement and a commit of its own, two for a device, and then
// all devices of the user in one transaction: the signatures wait for that.

// heldSignatures are signatures on the devices of users whose PutDevices is yet to come.
type heldSignatures struct {
	mu     sync.Mutex
	ofUser map[id.UserID][]keySignature
}

// keySignature is a row of mautrix's about a key that another one has signed.
type keySignature struct {
	signedUserID id.UserID
	signedKey    id.Ed25519
	signerUserID id.UserID
	signerKey    id.Ed25519
	signature    string
}

// GetMassInsertValues implements [dbutil.MassInsertable].
func (k keySignature) GetMassInsertValues() [5]any {
	return [5]any{k.signedUserID, k.signedKey, k.signerUserID, k.signerKey, k.signature}
}

const upsertKeySignatureQuery = `
	INSERT INTO crypto_cross_signing_signatures (signed_user_id, signed_key, signer_user_id, signer_key, signature) VALUES ($1, $2, $3, $4, $5)
	ON CONFLICT (signed_user_id, signed_key, signer_user_id, signer_key) DO UPDATE SET signature=excluded.signature
`

var upsertKeySignatures = dbutil.NewMassInsertBuilder[keySignature, [0]any](upsertKeySignatureQuery, "($%d, $%d, $%d, $%d, $%d)")

func (h *heldSignatures) hold(k keySignature) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ofUser == nil {
		h.ofUser = make(map[id.UserID][]keySignature)
	}
	h.ofUser[k.signedUserID] = append(h.ofUser[k.signedUserID], k)
}

func (h *heldSignatures) take(userID id.UserID) []keySignature {
	h.mu.Lock()
	defer h.mu.Unlock()
	held := h.ofUser[userID]
	delete(h.ofUser, userID)
	return held
}

// signsDevices is the function of mautrix's after which FetchKeys calls PutDevices for the same user, whatever comes in between: it neither
// returns nor waits for anything before. A test pins it. If mautrix calls it something else one day, signatures are written one by one.
const signsDevices = "maunium.net/go/mautrix/crypto.(*OlmMachine).storeDeviceSelfSignatures"

// PutSignature implements [crypto.Store]. Signatures that a key query brings of a user's devices are written by PutDevices, which follows at
// once; what anybody else puts is durable when it returns.
func (u *unitOfWork) PutSignature(
	ctx context.Context, signedUserID id.UserID, signedKey id.Ed25519, signerUserID id.UserID, signerKey id.Ed25519, signature string,
) error {
	if calledFrom(signsDevices) {
		u.held.hold(keySignature{signedUserID, signedKey, signerUserID, signerKey, signature})
		return nil
	}
	return u.SQLCryptoStore.PutSignature(ctx, signedUserID, signedKey, signerUserID, signerKey, signature)
}

// calledFrom says whether the caller was called by that function.
func calledFrom(function string) bool {
	var callers [1]uintptr
	if runtime.Callers(3, callers[:]) == 0 {
		return false
	}
	frame, _ := runtime.CallersFrames(callers[:]).Next()
	return frame.Function == function
}

// PutDevices implements [crypto.Store]. The signatures that wait for it are part of its transaction. If that fails, each is tried by itself, as
// mautrix would have: one that PostgreSQL does not take must not keep the devices from being stored.
func (u *unitOfWork) PutDevices(ctx context.Context, userID id.UserID, devices map[id.DeviceID]*id.Device) error {
	held := u.held.take(userID)
	if len(held) == 0 {
		return u.SQLCryptoStore.PutDevices(ctx, userID, devices)
	}
	err := u.DB.DoTxn(ctx, nil, func(ctx context.Context) error {
		err := insertAll(ctx, u.DB, upsertKeySignatures, held, func(k keySignature) keySignature {
			return keySignature{stored(u.DB, k.signedUserID), stored(u.DB, k.signedKey), stored(u.DB, k.signerUserID), stored(u.DB, k.signerKey), ""}
		})
		if err != nil {
			return err
		}
		return u.SQLCryptoStore.PutDevices(ctx, userID, devices)
	})
	if err == nil {
		return nil
	}
	for _, k := range held {
		if err = u.SQLCryptoStore.PutSignature(ctx, k.signedUserID, k.signedKey, k.signerUserID, k.signerKey, k.signature); err != nil {
			zerolog.Ctx(ctx).Warn().Err(err).Stringer("user_id", userID).Msg("Failed to store a signature on a device")
		}
	}
	return u.SQLCryptoStore.PutDevices(ctx, userID, devices)
}
