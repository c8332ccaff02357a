package bot

import (
	"context"
	"fmt"
	"html"
	"strings"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/attachment"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

func bulleted(items []string) []string {
	lines := make([]string, len(items))
	for i, item := range items {
		lines[i] = "• " + item
	}
	return lines
}

// escapeHTML makes a text fit for HTML, with its line breaks.
func escapeHTML(text string) string {
	return strings.ReplaceAll(html.EscapeString(text), "\n", "<br/>")
}

// clipTo shortens a text to a length in characters.
func clipTo(text string, length int) string {
	letters := []rune(text)
	if len(letters) <= length {
		return text
	}
	return string(letters[:length]) + "…"
}

// upload puts a file on the homeserver and into the message: encrypted if the room is.
// https://spec.matrix.org/v1.16/client-server-api/#sending-encrypted-attachments
func (b *Bot) upload(ctx context.Context, roomID id.RoomID, content *event.MessageEventContent, a attachmentFile) error {
	encrypted, err := b.client.StateStore.IsEncrypted(ctx, roomID)
	if err != nil {
		return fmt.Errorf("failed to look up whether the room is encrypted: %w", err)
	}
	data, mimeType := a.data, a.mimeType
	if encrypted {
		content.File = &event.EncryptedFileInfo{EncryptedFile: *attachment.NewEncryptedFile()}
		data, mimeType = content.File.Encrypt(a.data), "application/octet-stream"
	}
	uploaded, err := b.client.UploadMedia(ctx, mautrix.ReqUploadMedia{ContentBytes: data, ContentType: mimeType})
	if err != nil {
		return err
	}
	if encrypted {
		content.File.URL = uploaded.ContentURI.CUString()
	} else {
		content.URL = uploaded.ContentURI.CUString()
	}
	return nil
}
