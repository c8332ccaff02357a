package cryptohook

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/backup"
	"maunium.net/go/mautrix/id"
)

// The server-side key backup of our account. https://spec.matrix.org/v1.16/client-server-api/#server-side-key-backups
//
// That the public key of the newest version is the one of our private key shows that the backup is ours, and that what is put into it can
// be read by us alone. It does not show who has put it there: the public key is enough to add an entry, and the server has it (MSC4048
// would change that). So a session from the backup is as good as hearsay.

// keyBackup is a version of the backup that we have the private key of.
type keyBackup struct {
	version id.KeyBackupVersion
	key     *backup.MegolmBackupKey
}

var (
	errBackupKey      = errors.New("the key of the backup is not readable")
	errBackupEntry    = fmt.Errorf("%w: the backup's entry cannot be decrypted", errBadExport)
	errBackupVersion  = errors.New("the homeserver's answer about the key backup names no version of it")
	errOthersBackup   = errors.New("the newest key backup is not the one that we have the key of")
	errOtherAlgorithm = errors.New("the newest key backup has an algorithm that is not known")
)

// SetBackupKey stores the private key of the account's key backup (32 bytes), as it is in the secret storage under m.megolm_backup.v1.
// From then on keys that are missing are looked up in the backup.
func (h *Hook) SetBackupKey(ctx context.Context, key []byte) error {
	if _, err := backup.MegolmBackupKeyFromBytes(key); err != nil {
		return fmt.Errorf("%w: %w", errBackupKey, err)
	}
	return h.store.write(ctx, func(ctx context.Context) error {
		return h.uow.PutSecret(ctx, id.SecretMegolmBackupV1, base64.StdEncoding.EncodeToString(key))
	})
}

// backupKey gives the private key of the backup as it is stored here, or nil.
func (h *Hook) backupKey(ctx context.Context) (*backup.MegolmBackupKey, error) {
	secret, err := h.uow.GetSecret(ctx, id.SecretMegolmBackupV1)
	if err != nil || secret == "" {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(secret)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBackupKey, err)
	}
	key, err := backup.MegolmBackupKeyFromBytes(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBackupKey, err)
	}
	return key, nil
}

// backupVersion is a version of the account's key backup as the homeserver tells of it.
type backupVersion = mautrix.RespRoomKeysVersion[backup.MegolmAuthData]

// longestBackupVersion is more than any homeserver needs for the name of a version.
const longestBackupVersion = 255

// newestBackup asks for the newest version of the backup, whoever has made it. Nil: there is none.
func (h *Hook) newestBackup(ctx context.Context) (*backupVersion, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	newest, err := h.client.GetKeyBackupLatestVersion(ctx)
	switch {
	case errors.Is(err, mautrix.MNotFound):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("failed to ask for the newest key backup: %w", err)
	case newest == nil || newest.Version == "" || len(newest.Version) > longestBackupVersion:
		return nil, errBackupVersion
	}
	return newest, nil
}

// publicKeyOf is the public key of a backup as its auth_data has it.
func publicKeyOf(key *backup.MegolmBackupKey) id.Ed25519 {
	return id.Ed25519(base64.RawStdEncoding.EncodeToString(key.PublicKey().Bytes()))
}

// isOf says whether a version is that of a private key. One with an algorithm that we do not know is nobody's.
func isOf(version *backupVersion, key *backup.MegolmBackupKey) bool {
	return key != nil && version.Algorithm == id.KeyBackupAlgorithmMegolmBackupV1 && version.AuthData.PublicKey == publicKeyOf(key)
}

// openBackup gives the newest version of the backup, or nil when there is none that is ours.
func (h *Hook) openBackup(ctx context.Context) (*keyBackup, error) {
	key, err := h.backupKey(ctx)
	if err != nil || key == nil {
		return nil, err
	}
	newest, err := h.newestBackup(ctx)
	switch {
	case err != nil || newest == nil:
		return nil, err
	case isOf(newest, key):
		return &keyBackup{newest.Version, key}, nil
	}
	fault := errOthersBackup
	if newest.Algorithm != id.KeyBackupAlgorithmMegolmBackupV1 {
		fault = errOtherAlgorithm
	}
	zerolog.Ctx(ctx).Warn().Err(fault).Msg("Not looking for keys in the backup")
	return nil, nil
}

// fetchFromBackup looks a session up in the backup and imports it. An entry that is not valid counts as none. Errors are the network's,
// or the store's: [errStorage].
func (h *Hook) fetchFromBackup(ctx context.Context, from *keyBackup, key *missingKey, result *ImportResult) (found bool, err error) {
	if from == nil {
		return false, nil
	}
	session, err := h.lookUp(ctx, from, key)
	if err == nil && session == nil {
		return false, nil
	}
	if err == nil {
		if err = h.importSession(ctx, session, result); err != nil && !isExportFault(err) {
			return false, fmt.Errorf("%w: %w", errStorage, err)
		}
	}
	switch {
	case isExportFault(err):
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Ignoring an entry of the key backup")
		return false, nil
	case err != nil:
		return false, err
	}
	zerolog.Ctx(ctx).Debug().Msg("Found a key in the backup")
	return true, nil
}

// lookUp gives what the backup has of a session, or nil.
func (h *Hook) lookUp(ctx context.Context, from *keyBackup, key *missingKey) (*crypto.InboundGroupSession, error) {
	request, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	entry, err := h.client.GetKeyBackupForRoomAndSession(request, from.version, key.roomID, key.sessionID)
	var httpError mautrix.HTTPError
	switch {
	case errors.Is(err, mautrix.MNotFound):
		return nil, nil
	case errors.As(err, &httpError) && httpError.IsStatus(200):
		// The server has answered, and what it has cannot be parsed. It will not be better the next time.
		return nil, fmt.Errorf("%w: %w", errBackupEntry, err)
	case err != nil:
		return nil, err
	case entry == nil:
		return nil, errBackupEntry
	}
	data, err := from.decrypt(&entry.SessionData)
	if err != nil {
		return nil, err
	}
	session, err := parseExport(&crypto.ExportedSession{
		Algorithm: data.Algorithm, RoomID: key.roomID, SessionID: key.sessionID, SessionKey: data.SessionKey, SenderKey: data.SenderKey,
		SenderClaimedKeys: crypto.SenderClaimedKeys{Ed25519: data.SenderClaimedKeys.Ed25519}, SharedHistory: data.SharedHistory,
	}, id.KeySourceBackup, h.client.UserID)
	if session != nil {
		session.KeyBackupVersion = from.version
	}
	return session, err
}

// decrypt opens an entry. Without an ephemeral key mautrix 0.31 would panic.
func (b *keyBackup) decrypt(entry *backup.EncryptedSessionData[backup.MegolmSessionData]) (*backup.MegolmSessionData, error) {
	if entry.Ephemeral.PublicKey == nil {
		return nil, errBackupEntry
	}
	data, err := entry.Decrypt(b.key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBackupEntry, err)
	}
	return data, nil
}
