package cryptohook

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/crypto/ssss"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// How the account gets its key backup. Three places know of one: the account's secret storage has its private key, encrypted, so that
// whoever has the recovery key can read it; our database has the private key; the server has the version, with the public key, which our
// device and our master key have signed. They are made in that order, and any of them may be missing: a crash came in between, or
// the database is a new one, or another program of the account did its part.
//
//	version on the server   secret storage    database       what is done
//	none                    nothing           nothing        a new key: into both, and then the version
//	none                    a key             -              that key: into the database, and then the version
//	none                    nothing           a key          that key: into the secret storage, and then the version
//	of the key in the       that key          another, none  the key is taken into the database
//	  secret storage
//	of the key in the       nothing           that key       the key is put into the secret storage
//	  database
//	of the key in the       another           that key       the version is being renewed: another one, of the key in the secret storage,
//	  database                                                and then that key into the database
//	of neither              -                 -              another's: it is left alone, and so is everything else
//
// Once the account has another identity (see [Hook.RenewBackup]), a new key takes the place of the one that would be chosen by this. It is
// noted that this is to be done, until the new key is in the database; another key than that of the database in the secret storage is it.
//
// Without the recovery key, what is in the secret storage cannot be read or changed. Then a version is made only of a key that is in the
// database and, as far as can be seen, in the secret storage: it is put into the database after that.

// Errors of [Hook.KeepBackup] that somebody has to act upon.
var (
	// ErrOthersBackup: the account has a key backup that we have no key of, so another program has made it. It is left alone.
	ErrOthersBackup = errors.New("the account has a key backup that another program has made")
	// ErrStorageKeyNeeded: the account's recovery key is needed to make a key backup, or to look for the key of the one that is there.
	ErrStorageKeyNeeded = errors.New("the recovery key is needed for the key backup")
)

var errBackupNotShown = errors.New("the homeserver does not show the key backup that it was given")

// KeepBackup has the hook keep the account's server-side key backup: from now on, while [Hook.Run] runs, every session that is stored is
// put into it. If the account has no backup, one is made. It is to be called before Run, when the account's cross-signing keys are
// published and the machine has their private parts.
//
// storage is the account's default secret storage, opened by its recovery key; nil if that is not at hand, which is enough for a backup
// that was made before. It fails with [ErrOthersBackup] or [ErrStorageKeyNeeded] when somebody has to do something first; Run then looks
// again once an hour. After every other error Run tries again by back-off.
func (h *Hook) KeepBackup(ctx context.Context, storage *ssss.Key) error {
	h.keeper.wanted, h.keeper.storage = true, storage
	return h.keeper.look(h.log.With().Str("component", "key backup").Logger().WithContext(ctx))
}

// secretRenewBackup is, under the database's secrets, the master key of the identity that the backup is to be renewed for.
const secretRenewBackup id.Secret = "dev.sendertrust.renew_backup"

// RenewBackup notes that the account is about to get the identity with that master key. Whoever has the former recovery key has the key of
// the former backup: if that is ours, [Hook.KeepBackup] puts another one in its place, with a new key, and everything into that. The former
// one stays on the server. The note is durable. It is to be made before the identity is published, so that no crash comes in between.
func (h *Hook) RenewBackup(ctx context.Context, masterKey id.Ed25519) error {
	err := h.store.write(ctx, func(ctx context.Context) error {
		return h.uow.PutSecret(ctx, secretRenewBackup, masterKey.String())
	})
	if err != nil {
		return fmt.Errorf("failed to note that the key backup is to be renewed: %w", err)
	}
	return nil
}

// renewsBackup says that the backup is still to be renewed for the identity that the account has.
func (h *Hook) renewsBackup(ctx context.Context) (bool, error) {
	masterKey, err := h.uow.GetSecret(ctx, secretRenewBackup)
	if err != nil {
		return false, fmt.Errorf("failed to read whether the key backup is to be renewed: %w", err)
	}
	return masterKey != "" && masterKey == h.anchor().masterKey.String(), nil
}

// settle gives the backup that is to be kept, and makes what is missing of it.
func (k *backupKeeper) settle(ctx context.Context) (*keyBackup, error) {
	h, storage := k.hook, k.storage
	local, err := h.backupKey(ctx)
	if err != nil {
		return nil, err
	}
	stored, exists, err := h.storedBackupKey(ctx, storage)
	if err != nil {
		return nil, err
	}
	if stored != nil && local == nil {
		// From now on keys are looked up there, whatever else fails.
		if err = h.SetBackupKey(ctx, stored.Bytes()); err != nil {
			return nil, fmt.Errorf("failed to store the key of the key backup: %w", err)
		}
		local = stored
	}
	newest, err := h.newestBackup(ctx)
	if err != nil {
		return nil, err
	}
	renew, err := h.renewsBackup(ctx)
	if err != nil {
		return nil, err
	}
	key, missing, err := chooseBackupKey(newest, stored, local, storage != nil, exists)
	switch {
	case err != nil:
		return nil, err
	case renew && storage == nil:
		return nil, fmt.Errorf("%w: the account has another identity than its backup was made for", ErrStorageKeyNeeded)
	case missing && k.made:
		// A server that shows nothing of what it takes is not to be given one after the other.
		return nil, errBackupNotShown
	case key == nil || renew && (stored == nil || stored.Equal(local.PrivateKey)):
		missing = true
		if key, err = backup.NewMegolmBackupKey(); err != nil {
			return nil, fmt.Errorf("failed to make a key for the key backup: %w", err)
		}
	}
	if storage != nil && (stored == nil || !stored.Equal(key.PrivateKey)) {
		if err = h.mach.SSSS.SetEncryptedAccountData(ctx, event.AccountDataMegolmBackupKey, key.Bytes(), storage); err != nil {
			return nil, fmt.Errorf("failed to put the key of the key backup into the secret storage: %w", err)
		}
	}
	// While there is a version of ours, its key is kept until there is another one.
	renewing := missing && newest != nil
	if !renewing {
		if err = h.keepBackupKey(ctx, local, key); err != nil {
			return nil, err
		}
	}
	if !missing {
		h.signBackup(ctx, newest, key)
		return &keyBackup{newest.Version, key}, nil
	}
	made, err := k.make(ctx, key)
	if err == nil && renewing {
		err = h.keepBackupKey(ctx, local, key)
	}
	return made, err
}

// keepBackupKey stores the private key of the backup if it is not there. A former one is renewed with that.
func (h *Hook) keepBackupKey(ctx context.Context, local, key *backup.MegolmBackupKey) error {
	if local != nil && local.Equal(key.PrivateKey) {
		return nil
	}
	err := h.store.write(ctx, func(ctx context.Context) error {
		if err := h.SetBackupKey(ctx, key.Bytes()); err != nil {
			return err
		}
		return h.uow.DeleteSecret(ctx, secretRenewBackup)
	})
	if err != nil {
		return fmt.Errorf("failed to store the key of the key backup: %w", err)
	}
	return nil
}

// chooseBackupKey gives the key of the backup by what is known of it (see the table), and says whether its version is missing. Nil: a new
// one is to be made. opened says that the secret storage could be read, exists that there is something in it.
func chooseBackupKey(newest *backupVersion, stored, local *backup.MegolmBackupKey, opened, exists bool) (key *backup.MegolmBackupKey, missing bool, err error) {
	switch {
	case newest == nil && stored != nil:
		return stored, true, nil
	case newest == nil && (opened || local != nil && exists):
		return local, true, nil
	case newest == nil:
		return nil, true, fmt.Errorf("%w: the account has none yet", ErrStorageKeyNeeded)
	case isOf(newest, stored):
		return stored, false, nil
	case isOf(newest, local) && stored != nil:
		return stored, true, nil
	case isOf(newest, local):
		return local, false, nil
	case !opened && exists:
		return nil, false, fmt.Errorf("%w: the account has one, whose key is perhaps in its secret storage", ErrStorageKeyNeeded)
	default:
		return nil, false, ErrOthersBackup
	}
}

// storedBackupKey gives the private key of the backup that is in the secret storage, if that is open, and says whether there is one for
// it. What is no key, or cannot be decrypted, counts as none: it opens no backup for anybody.
func (h *Hook) storedBackupKey(ctx context.Context, storage *ssss.Key) (key *backup.MegolmBackupKey, exists bool, err error) {
	var secret ssss.EncryptedAccountDataEventContent
	err = h.client.GetAccountData(ctx, event.AccountDataMegolmBackupKey.Type, &secret)
	switch {
	case errors.Is(err, mautrix.MNotFound):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("failed to look for the key of the key backup in the secret storage: %w", err)
	case storage == nil:
		return nil, len(secret.Encrypted) > 0, nil
	}
	raw, err := secret.Decrypt(event.AccountDataMegolmBackupKey.Type, storage)
	if err == nil {
		key, err = backup.MegolmBackupKeyFromBytes(raw)
	}
	if err != nil {
		zerolog.Ctx(ctx).Debug().Err(err).Msg("The secret storage has no key of the key backup that can be used")
		return nil, false, nil
	}
	return key, true, nil
}

// make makes a new version on the server. That its answer is lost harms nothing: the version is found the next time.
func (k *backupKeeper) make(ctx context.Context, key *backup.MegolmBackupKey) (*keyBackup, error) {
	h := k.hook
	data, err := h.backupAuthData(key)
	if err != nil {
		return nil, err
	}
	request, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err = h.client.CreateKeyBackupVersion(request, &mautrix.ReqRoomKeysVersionCreate[backup.MegolmAuthData]{
		Algorithm: id.KeyBackupAlgorithmMegolmBackupV1, AuthData: data,
	})
	if err != nil {
		return nil, fmt.Errorf("failed to make a key backup: %w", err)
	}
	k.made = true
	// What counts is what everybody is shown.
	newest, err := h.newestBackup(ctx)
	switch {
	case err != nil:
		return nil, err
	case newest == nil || !isOf(newest, key):
		return nil, errBackupNotShown
	}
	zerolog.Ctx(ctx).Info().Stringer("version", newest.Version).Msg("Made a key backup for the account")
	return &keyBackup{newest.Version, key}, nil
}

// backupAuthData is what tells other devices of the account that the backup is to be trusted.
func (h *Hook) backupAuthData(key *backup.MegolmBackupKey) (data backup.MegolmAuthData, err error) {
	public := struct {
		PublicKey id.Ed25519 `json:"public_key"`
	}{publicKeyOf(key)}
	byDevice, err := h.mach.GetAccount().SignJSON(public)
	if err != nil {
		return data, fmt.Errorf("failed to sign the key backup: %w", err)
	}
	keys := h.mach.CrossSigningKeys
	if keys == nil {
		return data, errors.New("failed to sign the key backup: the account's master key is not at hand")
	}
	byMaster, err := keys.MasterKey.SignJSON(public)
	if err != nil {
		return data, fmt.Errorf("failed to sign the key backup: %w", err)
	}
	return backup.MegolmAuthData{PublicKey: public.PublicKey, Signatures: signatures.Signatures{h.client.UserID: {
		id.NewKeyID(id.KeyAlgorithmEd25519, h.client.DeviceID.String()):          byDevice,
		id.NewKeyID(id.KeyAlgorithmEd25519, keys.MasterKey.PublicKey().String()): byMaster,
	}}}, nil
}

// signBackup signs a version that is ours and does not show it: the account's identity is a new one, or another program has made it with
// the key in the secret storage. The version can be used without that.
func (h *Hook) signBackup(ctx context.Context, newest *backupVersion, key *backup.MegolmBackupKey) {
	masterKey := h.anchor().masterKey
	if signed, _ := signatures.VerifySignatureJSON(newest.AuthData, h.client.UserID, masterKey.String(), masterKey); signed {
		return
	}
	data, err := h.backupAuthData(key)
	if err == nil {
		request, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		// The method that mautrix 0.31 has for this sends no body.
		_, err = h.client.MakeRequest(request, http.MethodPut, h.client.BuildClientURL("v3", "room_keys", "version", newest.Version),
			&mautrix.ReqRoomKeysVersionUpdate[backup.MegolmAuthData]{Algorithm: newest.Algorithm, AuthData: data, Version: newest.Version}, nil)
	}
	if err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to sign the key backup with the account's identity; using it all the same")
	}
}
